"""What a key of the schema takes, in words, and what the user probably wanted to write."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from megatron_moe.config.keys import alternatives, named_section_in, section_in
from megatron_moe.config.origin import shown

_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
_BASES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping of names to values",
}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def expected(annotation: Any) -> str:
    """For example `a whole number of at least 1`."""
    parts = alternatives(annotation)
    if len(parts) > 1:
        return ", or ".join(_expected_among(part, parts) for part in parts)
    inner, constraints = _unwrapped(parts[0])
    if named_section_in(annotation) is not None:
        return "sections by name, their keys indented below"
    if section_in(inner) is not None:
        return "a section, its keys indented below it"
    if get_origin(inner) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(inner))
    if get_origin(inner) is list:
        return f"a list{_length(constraints)}, each {expected(get_args(inner)[0])}"
    if pattern := constraints.get("pattern"):
        return _pattern(pattern)
    base = _BASES.get(get_origin(inner) or inner, "a value")
    if base == "text" and constraints.get("min_length"):
        return "text that is not empty"
    if inner is int and constraints.get("ge") == 0 and constraints.get("le") == 1:
        return "0 or 1"
    if "ge" in constraints and "le" in constraints:
        return f"{base} from {_bound(constraints['ge'])} to {_bound(constraints['le'])}"
    bounds = [
        f"{words} {_bound(constraints[name])}" for name, words in _BOUNDS.items() if name in constraints
    ]
    return f"{base} {' and '.join(bounds)}" if bounds else base


def _expected_among(part: Any, parts: tuple[Any, ...]) -> str:
    """One of several things that a key takes: a section by its keys, a list of the others without repeating
    them."""
    if (section := section_in(part)) is not None:
        return f"{{{', '.join(section.model_fields)}}}"
    if set(alternatives(_entry(part))) < set(parts):
        return "a list of these"
    return expected(part)


def _entry(annotation: Any) -> Any:
    """What a list holds; None for anything else."""
    inner, _ = _unwrapped(annotation)
    return get_args(inner)[0] if get_origin(inner) is list else None


def _bound(number: int | float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def remedy(annotation: Any, value: Any, default: Any) -> str:
    """A value that would work: what `value` seems to mean where that can be told, else an example."""
    parts = alternatives(annotation)
    kinds = {_unwrapped(part)[0] for part in parts}
    for part in parts:
        entries = alternatives(_entry(part))
        # What is wrong by itself is not right in a list, nor meant as one where a number may stand, too.
        alone = entries[0] in parts or (entries[0] is not None and type(value) in kinds)
        if not alone and (rewritten := _rewritten(part, value)) is not None:
            return f"write {rewritten}"
    if default is not None:
        return f"for example {shown(default)}"
    if section_in(annotation) is not None:
        return "see configs/quickstart.yaml"
    return f"for example {_example(alternatives(annotation)[0])}"


def _unwrapped(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """The bare type below `Annotated`, and all constraints on it by name."""
    constraints: dict[str, Any] = {}
    while get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
        for mark in _flat(marks):
            names = (*_BOUNDS, "min_length", "max_length", "pattern")
            constraints |= {name: bound for name in names if (bound := getattr(mark, name, None)) is not None}
        constraints["is_path"] = any(getattr(mark, "json_schema_extra", None) for mark in marks)
    return annotation, constraints


def _flat(marks: list[Any]) -> Iterator[Any]:
    for mark in marks:
        inner = getattr(mark, "metadata", None)
        if isinstance(inner, list):
            yield from inner
        else:
            yield mark


def _length(constraints: dict[str, Any]) -> str:
    least, most = constraints.get("min_length"), constraints.get("max_length")
    if least is not None and least == most:
        return f" of {least} entries"
    if least is not None and most is not None:
        return f" of {least} to {most} entries"
    return f" of at least {least} entries" if least is not None and least > 1 else " of one or more entries"


def _pattern(pattern: str) -> str:
    assert pattern.startswith("^[A-Za-z0-9]"), pattern
    return "text of letters, digits, '.', '_' and '-', the first one a letter or digit"


def _rewritten(annotation: Any, value: Any) -> str | None:
    inner, constraints = _unwrapped(annotation)
    if get_origin(inner) is Literal and isinstance(value, str):
        close = difflib.get_close_matches(value.lower(), [str(choice) for choice in get_args(inner)], n=1)
        return close[0] if close else None
    if get_origin(inner) is list and not isinstance(value, list | dict) and value is not None:
        part = alternatives(get_args(inner)[0])[0]
        is_enough = constraints.get("min_length", 1) <= 1
        return f"[{value}]" if is_enough and type(value) is _unwrapped(part)[0] else None
    if inner is bool:
        word = str(value).lower()
        return "true" if word in _TRUE else "false" if word in _FALSE else None
    if inner in (int, float):
        number = _number(inner, constraints, value)
        return f"{number} without quotes" if number and isinstance(value, str) else number
    if inner is str and isinstance(value, int | float) and not isinstance(value, bool):
        return f'"{value}"'
    if "pattern" in constraints and isinstance(value, str):
        legal = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("._-")
        return legal or None
    return None


def _number(kind: type[int] | type[float], constraints: dict[str, Any], value: Any) -> str | None:
    """The number that a text or a fraction-free float stands for, if it keeps the bounds."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(re.sub(r"(?<=\d),(?=\d{3}\b)", "", str(value)))
    except ValueError:
        return None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        return None
    least, above = constraints.get("ge", number), constraints.get("gt")
    most, below = constraints.get("le", number), constraints.get("lt")
    if (
        not least <= number <= most
        or (above is not None and number <= above)
        or (below is not None and number >= below)
    ):
        return None
    return str(int(number)) if kind is int else f"{number:g}"


def _example(annotation: Any) -> str:
    inner, constraints = _unwrapped(annotation)
    if get_origin(inner) is list:
        entry = _example(alternatives(get_args(inner)[0])[0])
        return f"[{', '.join([entry] * constraints.get('min_length', 1))}]"
    if get_origin(inner) is Literal:
        return str(get_args(inner)[0])
    if inner is int:
        return str(max(1, constraints.get("ge", 1)))
    if inner is float:
        return "0.5" if "lt" in constraints or "le" in constraints else "1.0"
    text = (
        "some/path" if constraints.get("is_path") else "my-run" if "pattern" in constraints else "some-name"
    )
    return {bool: "true", dict: "{}"}.get(inner, text)
