"""A tree of plain values against the schema: every unknown, missing and mistyped key, each in one line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_origin

from pydantic import ValidationError

from megatron_moe.config.keys import (
    alternatives,
    hints,
    known_keys,
    meant,
    meant_variant,
    named_section_in,
    schema_key,
    section_in,
    union_of,
    unions,
    variants_in,
)
from megatron_moe.config.megatron_core_rules import as_unknown_key
from megatron_moe.config.origin import KeyPath, Origin, dotted, shown
from megatron_moe.config.schema import Experiment, Section
from megatron_moe.config.wording import expected, remedy

_S = TypeVar("_S", bound=Section)
_PLACE_IN_LIST = re.compile(r"\[\d+\]")


@dataclass
class Checked:
    """The experiment, and what is wrong with it: lines, and the keys that have no usable value.

    With broken keys the experiment lacks them altogether: reading one raises AttributeError. So what can be
    said about the other keys is still said.
    """

    experiment: Experiment
    problems: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)


def check(
    values: dict[str, Any], origins: dict[KeyPath, Origin], file: str, incomplete: bool = False
) -> Checked:
    """Validate `values`. `file` is the place of a missing top-level key; of `incomplete` values none is
    called missing."""
    try:
        return Checked(Experiment.model_validate(values))
    except ValidationError as error:
        findings = error.errors(include_url=False, include_input=False)
    problems: list[str] = []
    broken: set[str] = set()
    entries: dict[str, list[KeyPath]] = {}
    for finding in findings:
        location = finding["loc"]
        if not _is_of_what_is_meant(location, values):
            continue
        misnamed = location[-1] == "[key]"
        path = _known_part(location[:-1] if misnamed else location, values, finding["type"] == "missing")
        key = dotted(tuple(part for part in path if isinstance(part, str)))
        if finding["type"] == "extra_forbidden":
            problems.append(_unknown(path, values, origins, file))
            continue
        if misnamed:
            problems.append(_misnamed(path, origins, file))
            broken.add(key)
            continue
        broken.add(union_of(key) or key)
        if finding["type"] == "missing" and not incomplete:
            problems.append(f"{_place(path[:-1], origins, file)}{dotted(path)}: is missing; {_add(key)}")
        elif finding["type"] != "missing":
            entries.setdefault(dotted(_without_entry(path)), []).append(path)
    problems += [_mistyped(key, paths, values, origins, file) for key, paths in entries.items()]
    return Checked(_construct(Experiment, values, "", broken), problems, broken)


def unknown_key(key: str, place: str) -> str:
    """The line for a key that the schema does not have; `place` is its prefix."""
    plain = _PLACE_IN_LIST.sub("", key)
    guess = meant(plain)
    section, _, name = plain.rpartition(".")
    if (guess is None or not guess.endswith(f".{name}")) and (of_engine := as_unknown_key(name)) is not None:
        return f"{place}{key}: unknown key; {of_engine}"
    if guess is not None:
        return f"{place}{key}: unknown key; did you mean {guess}?"
    known_section = schema_key(section)
    if section and known_section is None:
        return f"{place}{key}: unknown key; did you mean {meant(section) or 'a key of another section'}?"
    siblings = [
        other.rpartition(".")[2]
        for other in known_keys()
        if other.rpartition(".")[0] == (known_section or "")
    ]
    inside = f"{section} has" if section else "a file has"
    extra = [] if section else ["extends"]
    return f"{place}{key}: unknown key; {inside} {', '.join(siblings + extra)}"


def _unknown(path: KeyPath, values: dict[str, Any], origins: dict[KeyPath, Origin], file: str) -> str:
    key, place = dotted(path), _place(path, origins, file)
    holder = union_of(_PLACE_IN_LIST.sub("", key))
    given = _at(values, path[:-1])
    if holder is None or not isinstance(given, dict):
        return unknown_key(key, place)
    meant_here, *others = sorted(
        unions()[holder], key=lambda it: it is not meant_variant(unions()[holder], given)
    )
    if not any(path[-1] in other.model_fields for other in others):
        return unknown_key(key, place)
    beside = ", ".join(name for name in given if name in meant_here.model_fields)
    kinds = ", or ".join(f"{{{', '.join(kind.model_fields)}}}" for kind in unions()[holder])
    return f"{place}{key}: does not go with {beside}; write {kinds}"


def _misnamed(path: KeyPath, origins: dict[KeyPath, Origin], file: str) -> str:
    """The line for a section whose name is none."""
    holder, name = dotted(path[:-1]), str(path[-1])
    legal = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_") or "web"
    what = "a name of letters, digits, '_' and '-', the first one a letter or digit"
    return (
        f"{_place(path, origins, file)}{holder}: must give each section {what} ({shown(name)}); write {legal}"
    )


def _known_part(location: tuple[int | str, ...], values: Any, missing: bool) -> KeyPath:
    """The part of pydantic's location that lies in the values: without the names of union members. Of a
    `missing` key the last part does not."""
    path: list[str | int] = []
    for number, part in enumerate(location):
        lacking = missing and number == len(location) - 1
        if isinstance(values, dict) and isinstance(part, str) and (part in values or lacking):
            path.append(part)
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            path.append(part)
            values = values[part]
    return tuple(path)


def _is_of_what_is_meant(location: tuple[int | str, ...], values: Any) -> bool:
    """Whether a finding of pydantic is about what a value is probably meant as, where it may be a section of
    one kind or another, a list of such, or a number: pydantic complains about each of them."""
    key, is_chosen, in_list = "", False, False
    for part in location:
        if isinstance(values, dict) and isinstance(part, str) and part in values:
            key = f"{key}.{part}" if key else part
            values, is_chosen, in_list = values[part], False, False
        elif isinstance(values, list) and isinstance(part, int):
            values, is_chosen, in_list = values[part], False, True
        elif not is_chosen and (variants := unions().get(key)):
            # The name of an alternative, of pydantic's making.
            is_chosen = True
            if isinstance(values, dict) and part != meant_variant(variants, values).__name__:
                return False
            has_list = any(get_origin(kind) is list for kind in alternatives(_annotation(key)))
            if has_list and not in_list and isinstance(values, list) != str(part).startswith("list["):
                return False
    return True


def _at(values: Any, path: KeyPath) -> Any:
    """The value at a path that is there."""
    for part in path:
        values = values[part]
    return values


def _without_entry(path: KeyPath) -> KeyPath:
    """The list, of a path that ends at an entry."""
    return path[:-1] if isinstance(path[-1], int) else path


def _place(path: KeyPath, origins: dict[KeyPath, Origin], file: str) -> str:
    for length in range(len(path), 0, -1):
        if (origin := origins.get(path[:length])) is not None:
            return origin.prefix()
    return f"{file}: " if file else ""


def _add(key: str) -> str:
    annotation = _annotation(key)
    inner = section_in(annotation)
    if inner is None:
        return f"give it {expected(annotation)}"
    needed = [name for name, info in inner.model_fields.items() if info.is_required()]
    return f"add the section with {', '.join(needed)}"


def _mistyped(
    key: str, paths: list[KeyPath], values: dict[str, Any], origins: dict[KeyPath, Origin], file: str
) -> str:
    known = _PLACE_IN_LIST.sub("", key)
    annotation = _annotation(known)
    value = _at(values, _without_entry(paths[0]))
    bad = sorted({path for path in paths if isinstance(path[-1], int)}, key=str)
    what = f"must be {expected(annotation)}"
    default = default_of(known)
    if isinstance(value, list) and bad:
        named = ", ".join(f"entry {int(path[-1]) + 1} is {shown(value[int(path[-1])])}" for path in bad)
        return f"{_place(bad[0], origins, file)}{key}: {what} ({named}); {remedy(annotation, value, default)}"
    shape = value if section_in(annotation) is None else None
    place, advice = _place(paths[0], origins, file), remedy(annotation, shape, default)
    return f"{place}{key}: {what} ({shown(value)}); {advice}"


def default_of(key: str) -> Any:
    """The schema's default of a dotted key; None for a required key and for a section."""
    holder, _, name = key.rpartition(".")
    if not holder:
        section: type[Section] | None = Experiment
    elif variants := variants_in(_annotation(holder)):
        section = next(variant for variant in variants if name in variant.model_fields)
    else:
        section = section_in(_annotation(holder))
    if section is None:  # a name that the user gave
        return None
    info = section.model_fields[name]
    return (
        None
        if info.is_required() or section_in(hints(section)[name])
        else info.get_default(call_default_factory=True)
    )


def _annotation(key: str) -> Any:
    """Of a key that the schema knows."""
    known = schema_key(key)
    assert known is not None, key
    return known_keys()[known]


def _construct(section: type[_S], values: dict[str, Any], prefix: str, broken: set[str]) -> _S:
    """The section from those values that are known and right; broken keys are left out of the object."""
    kept: dict[str, Any] = {}
    for name, annotation in hints(section).items():
        inner = section_in(annotation)
        if name not in values or prefix + name in broken:
            continue
        value, named, variants = values[name], named_section_in(annotation), variants_in(annotation)
        if named and isinstance(value, dict):
            kept[name] = {
                given: _construct(named, part, f"{prefix}{name}.{given}.", broken)
                for given, part in value.items()
                if f"{prefix}{name}.{given}" not in broken
            }
        elif inner and isinstance(value, dict):
            kept[name] = _construct(inner, value, f"{prefix}{name}.", broken)
        elif variants:
            kept[name] = _construct_variant(variants, value)
        else:
            kept[name] = value
    made = section.model_construct(**kept)
    for name in section.model_fields:
        if prefix + name in broken:
            made.__dict__.pop(name, None)
    return made


def _construct_variant(variants: tuple[type[Section], ...], value: Any) -> Any:
    """A right value of a key that may be a section of several kinds."""
    if isinstance(value, list):
        return [_construct_variant(variants, entry) for entry in value]
    return _construct(meant_variant(variants, value), value, "", set()) if isinstance(value, dict) else value
