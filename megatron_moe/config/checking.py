"""A tree of plain values against the schema: every unknown, missing and mistyped key, each in one line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from megatron_moe.config.keys import (
    hints,
    known_keys,
    meant,
    named_section_in,
    schema_key,
    section_in,
    value_at,
)
from megatron_moe.config.megatron_core_rules import as_unknown_key
from megatron_moe.config.origin import KeyPath, Origin, dotted, shown
from megatron_moe.config.schema import Experiment, Section
from megatron_moe.config.wording import expected, remedy

_S = TypeVar("_S", bound=Section)


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
        broken.add(key)
        if finding["type"] == "missing" and not incomplete:
            problems.append(f"{_place(path[:-1], origins, file)}{key}: is missing; {_add(key)}")
        elif finding["type"] != "missing":
            entries.setdefault(key, []).append(path)
    problems += [_mistyped(key, paths, values, origins, file) for key, paths in entries.items()]
    return Checked(_construct(Experiment, values, "", broken), problems, broken)


def unknown_key(key: str, place: str) -> str:
    """The line for a key that the schema does not have; `place` is its prefix."""
    guess = meant(key)
    section, _, name = key.rpartition(".")
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
    return unknown_key(dotted(path), _place(path, origins, file))


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
    annotation = _annotation(key)
    value = value_at(values, key)
    bad = sorted({path for path in paths if isinstance(path[-1], int)}, key=str)
    what = f"must be {expected(annotation)}"
    default = default_of(key)
    if isinstance(value, list) and bad:
        named = ", ".join(f"entry {int(path[-1]) + 1} is {shown(value[int(path[-1])])}" for path in bad)
        return f"{_place(bad[0], origins, file)}{key}: {what} ({named}); {remedy(annotation, value, default)}"
    shape = value if section_in(annotation) is None else None
    place, advice = _place(paths[0], origins, file), remedy(annotation, shape, default)
    return f"{place}{key}: {what} ({shown(value)}); {advice}"


def default_of(key: str) -> Any:
    """The schema's default of a dotted key; None for a required key and for a section."""
    holder, _, name = key.rpartition(".")
    section = cast(type[Section], section_in(_annotation(holder))) if holder else Experiment
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
        value, named = values[name], named_section_in(annotation)
        if named and isinstance(value, dict):
            kept[name] = {
                given: _construct(named, part, f"{prefix}{name}.{given}.", broken)
                for given, part in value.items()
                if f"{prefix}{name}.{given}" not in broken
            }
        elif inner and isinstance(value, dict):
            kept[name] = _construct(inner, value, f"{prefix}{name}.", broken)
        else:
            kept[name] = value
    made = section.model_construct(**kept)
    for name in section.model_fields:
        if prefix + name in broken:
            made.__dict__.pop(name, None)
    return made
