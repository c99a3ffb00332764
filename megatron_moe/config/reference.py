"""The reference page of all keys, made from the schema: `docs/reference/config.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from megatron_moe.config.dump import flow
from megatron_moe.config.keys import (
    NAME,
    alternatives,
    hints,
    named_section_in,
    section_in,
    unions,
    variants_in,
)
from megatron_moe.config.schema import Experiment, Section

_HEAD = """\
# Every key

One YAML file describes an experiment. Each section of the file is a section of this page; inside a section
keys may stand in any order, and all but the required ones may be left out, also the section as a whole where
it has none of these. `megatron-moe validate CONFIG` prints an experiment with every value filled in, and with
`--provenance` where each of them came from.

Behind CONFIG every command takes keys with dots between their parts, `training.train_iters=20`, which win
over the file. Scalars follow YAML 1.2. `null` stands for "not set": the default is taken. Paths are relative
to the file that they stand in; those behind CONFIG, and `logging.root`, to the working directory.

Made from the schema: `python -m megatron_moe.config.reference > docs/reference/config.md`.

## At the top

| key | type | default | what it is |
| --- | --- | --- | --- |
"""
_EXTENDS = (
    "`extends`",
    "text, or list of text",
    "none",
    "Files that this one builds on, relative to it. Sections are merged key by key; a later file wins, and "
    "this one over all.",
)
_DEFAULT = re.compile(r"\s*Default: (.+)$", re.DOTALL)
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_BASES = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", dict: "mapping"}


def reference_text() -> str:
    """What `docs/reference/config.md` holds."""
    rows = [_row("name", hints(Experiment)["name"], Experiment), _EXTENDS]
    parts = [_HEAD + "\n".join(_table_row(row) for row in rows)]
    for name, annotation in hints(Experiment).items():
        if (section := section_in(annotation)) is not None:
            parts += _section(section, name, 2)
    return "\n\n".join(parts) + "\n"


def _section(section: type[Section], key: str, depth: int) -> Iterator[str]:
    """Heading, description and table of a section, then those of the sections in it."""
    lines = ["| key | type | default | what it is |", "| --- | --- | --- | --- |"]
    inner: list[tuple[str, type[Section]]] = []
    for name, annotation in hints(section).items():
        lines.append(_table_row(_row(name, annotation, section, key)))
        if (own := section_in(annotation)) is not None:
            inner.append((f"{key}.{name}", own))
        elif (named := named_section_in(annotation)) is not None:
            inner.append((f"{key}.{name}.{NAME}", named))
        inner += [
            (_heading_of_variant(f"{key}.{name}", variant), variant) for variant in variants_in(annotation)
        ]
    yield f"{'#' * depth} {_heading(key)}"
    yield _one_line(section.__doc__)
    yield "\n".join(lines)
    for inner_key, inner_section in inner:
        if _first_place(inner_section) == inner_key:
            yield from _section(inner_section, inner_key, 3)


def _row(name: str, annotation: Any, section: type[Section], key: str = "") -> tuple[str, str, str, str]:
    """Key, type, default and description of one field; a default in the description moves to its own cell."""
    info = section.model_fields[name]
    text = _one_line(info.description)
    said = _DEFAULT.search(text)
    if said is not None:
        text = text[: said.start()]
    inner = section_in(annotation) or named_section_in(annotation)
    if inner is not None:
        text = text or _one_line(inner.__doc__)
    if info.is_required():
        default = "**required**"
    elif said is not None:
        default = said[1].rstrip(".")
    elif section_in(annotation) is not None and type(None) not in get_args(annotation):
        default = "its keys' defaults"
    else:
        value = info.get_default(call_default_factory=True)
        default = "none" if value is None else f"`{flow(value)}`"
    return f"`{name}`", _type(annotation), default, text


def _type(annotation: Any) -> str:
    """For example `integer ≥ 1`, or the choices."""
    parts = alternatives(annotation)
    if len(parts) > 1:
        return ", or ".join(_type_among(part, parts) for part in parts)
    if (section := section_in(annotation)) is not None:
        return f"section {_link(section)}"
    if (named := named_section_in(annotation)) is not None:
        return f"sections {_link(named)} by name"
    bare, marks = parts[0], []
    while get_origin(bare) is Annotated:
        bare, *more = get_args(bare)
        marks += [inner for mark in more for inner in getattr(mark, "metadata", None) or [mark]]
        if any((getattr(mark, "json_schema_extra", None) or {}).get("path") for mark in more):
            return "path"
    if get_origin(bare) is Literal:
        return ", ".join(f"`{flow(choice)}`" for choice in get_args(bare))
    bounds = [
        f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}"
        for name, sign in _BOUNDS.items()
        for mark in marks
        if (bound := getattr(mark, name, None)) is not None
    ]
    if get_origin(bare) is list:
        return f"list of {_type(get_args(bare)[0])}{_length(marks)}"
    if bounds == ["≥ 0", "≤ 1"] and bare is int:
        return "0 or 1"
    base = _BASES[get_origin(bare) or bare]
    return f"{base} {', '.join(bounds)}" if bounds else base


def _type_among(part: Any, parts: tuple[Any, ...]) -> str:
    """One of several types; a list of the others does not repeat them."""
    entries = set(alternatives(get_args(part)[0])) if get_origin(part) is list else set(parts)
    is_long = len(entries) > 1 or get_origin(next(iter(entries))) is Literal
    return "list of these" if is_long and entries < set(parts) else _type(part)


def _length(marks: list[Any]) -> str:
    """How many entries a list has, where that is bounded on both sides: ` (2 to 3 entries)`."""
    least = next((mark.min_length for mark in marks if hasattr(mark, "min_length")), None)
    most = next((mark.max_length for mark in marks if hasattr(mark, "max_length")), None)
    if least is None or most is None:
        return ""
    return f" ({least if least == most else f'{least} to {most}'} entries)"


def _link(section: type[Section]) -> str:
    key = _first_place(section)
    return f"[{_heading(key)}](#{_anchor(key)})"


def _first_place(wanted: type[Section]) -> str:
    """The key under which a section, which several others may hold, stands in this page."""
    for key, variants in unions().items():
        if wanted in variants:
            return _heading_of_variant(key, wanted)

    def search(section: type[Section], prefix: str) -> Iterator[str]:
        for name, annotation in hints(section).items():
            own, named = section_in(annotation), named_section_in(annotation)
            here = prefix + name if own is not None else f"{prefix}{name}.{NAME}"
            inner = own or named
            if inner is wanted:
                yield here
            elif inner is not None:
                yield from search(inner, f"{here}.")

    return next(search(Experiment, ""))


def _table_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _heading(key: str) -> str:
    return f"`{key}`" if NAME in key else key


def _heading_of_variant(key: str, variant: type[Section]) -> str:
    """Of a section that a value may be written as: two kinds of them have the same key."""
    first = next(name for name in variant.model_fields)
    return f"{key}, with {first}"


def _anchor(key: str) -> str:
    """The name that a heading has in links."""
    return re.sub(r"[^\w\- ]", "", _heading(key).lower()).replace(" ", "-")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    print(reference_text(), end="")
