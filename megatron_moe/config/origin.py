"""Where a value came from, and the one-line form of a mistake that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

KeyPath = tuple[str | int, ...]
"""Where a value stands in the YAML tree: keys of mappings and positions in lists."""


@dataclass(frozen=True)
class Origin:
    """`file` with its name and line, `override` of the command line, `default` of the schema, `derived` from
    other keys, or `planned` where the file says auto."""

    kind: Literal["file", "override", "default", "derived", "planned"]
    file: str = ""
    line: int = 0
    keys: tuple[str, ...] = ()
    """What a derived value follows from."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.kind == "file" else self.kind

    def behind(self, key: str) -> str:
        """What stands behind the value of `key`; keys of the same section without its name."""
        if self.kind != "derived":
            return str(self)
        section = key.rpartition(".")[0] + "."
        return f"derived from {', '.join(other.removeprefix(section) for other in self.keys)}"

    def prefix(self) -> str:
        """What an error line about this value starts with; empty where no text of the user stands behind
        it."""
        if self.kind == "file":
            return f"{self.file}:{self.line}: "
        return "override " if self.kind == "override" else ""


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Problem:
    """A mistake that values make together.

    `keys` are dotted; the line is reported at the first one. `text` continues "key: value ..." and names
    every other key in full, to which the renderer adds its value and its place. `remedy` says what would
    work.
    """

    keys: tuple[str, ...]
    text: str
    remedy: str

    def render(self, values: Mapping[str, Any], origins: Mapping[str, Origin], file: str = "") -> str:
        """One line. `values` and `origins` are by dotted key; `file` is the place of what the user did not
        write."""
        first, *others = self.keys
        text = self.text
        for key in others:
            if note := _note(key, values, origins):
                text = re.sub(_whole(key), f"{key} ({note})".replace("\\", "\\\\"), text, count=1)
        subject = ""
        if values.get(first) is not None:
            subject = f"{shown(values[first])} "
            if first in origins and not origins[first].prefix():
                subject += f"({origins[first]}) "
        return f"{_place(first, origins, file)}{first}: {subject}{text}; {self.remedy}"


def _note(key: str, values: Mapping[str, Any], origins: Mapping[str, Origin]) -> str:
    """The value of a key and where it came from; a key that nobody set has none."""
    origin = origins.get(key)
    parts = [shown(values[key])] if key in values else []
    if origin is not None:
        parts.append(str(origin))
    unset = values.get(key) is None and (origin is None or not origin.prefix())
    return "" if unset else ", ".join(parts)


def _place(key: str, origins: Mapping[str, Origin], file: str) -> str:
    """The line of the key, or of the section that it would stand in."""
    while key:
        if key in origins and (prefix := origins[key].prefix()):
            return prefix
        key = key.rpartition(".")[0]
    return f"{file}: " if file else ""


def _whole(key: str) -> str:
    """A pattern for the key that does not match inside a longer one."""
    return rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)"


def shown(value: Any, limit: int = 60) -> str:
    """A value as YAML would have it, cut to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def dotted(path: KeyPath) -> str:
    """`model.num_layers`; positions in lists as `[2]`, counted from 1."""
    text = ""
    for part in path:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text
