"""An experiment as YAML 1.2 text that `load` reads back to an equal one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_moe.config.keys import FREE_MAPPING, named_sections
from megatron_moe.config.origin import Origin
from megatron_moe.config.schema import Experiment, Section

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_RESERVED = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_COMMENT_COLUMN = 56


def to_yaml(experiment: Experiment, provenance: Mapping[str, Origin] | None = None) -> str:
    """Every key with its value; with `provenance` each line says where its value came from."""
    lines: list[str] = []
    for key, text in _lines(experiment, "", 0):
        origin = provenance.get(key) if provenance else None
        lines.append(text if origin is None else f"{text:<{_COMMENT_COLUMN}}  # {origin.behind(key)}")
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """One value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _RESERVED else _quoted(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(flow(entry) for entry in value)}]"
    if isinstance(value, Section):
        value = dict(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{flow(key)}: {flow(entry)}' for key, entry in value.items())}}}"
    assert isinstance(value, int), type(value)
    return str(value)


def _lines(section: Section | Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    """Dotted key and text of each line."""
    if isinstance(section, Section):
        items = {name: getattr(section, name) for name in type(section).model_fields}
    else:
        items = dict(section)
    for name, value in items.items():
        key, indent = f"{prefix}{name}", "  " * depth
        label = name if isinstance(section, Section) else flow(name)
        if isinstance(value, Section) or (value and key in (FREE_MAPPING, *named_sections())):
            yield key, f"{indent}{label}:"
            yield from _lines(value, f"{key}.", depth + 1)
        else:
            yield key, f"{indent}{label}: {flow(value)}"


def _quoted(text: str) -> str:
    """Double quotes; what is not printable as YAML's own escapes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in escaped) + '"'


def _float(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
