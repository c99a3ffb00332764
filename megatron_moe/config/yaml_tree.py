"""YAML 1.2 text into plain values, with the line of each key, and every duplicate key found.

Built on the node level of ruamel.yaml, because only nodes still know lines and repeated keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_moe.config.origin import KeyPath, Origin, dotted

_TAG = "tag:yaml.org,2002:"


@dataclass
class Tree:
    """Plain values, the origin of every key and list entry, and what was wrong while reading them."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    incomplete: bool = False
    """A file could not be read at all, so that nothing can be called missing."""


def parse(text: str, file: str) -> Tree:
    """Read one YAML document whose top is a mapping. Problems are lines `FILE:LINE: what; what would
    work`."""
    tree = Tree()
    try:
        node = _reader().compose(text)
    except (YAMLError, RecursionError) as error:
        tree.problems.append(_syntax_problem(error, file))
        tree.incomplete = True
        return tree
    if node is None or (isinstance(node, ScalarNode) and node.tag == _TAG + "null"):
        tree.problems.append(f"{file}: the file is empty; it needs at least name, model and training")
    elif not isinstance(node, MappingNode):
        tree.problems.append(
            f"{file}:{_line(node)}: the file must hold sections, `key: value`; start with `name: my-run`"
        )
    else:
        tree.values = _value(node, (), file, tree, ())
    return tree


def parse_value(text: str, path: KeyPath) -> Tree:
    """Read the value of an override, a YAML 1.2 scalar, list or mapping, as the tree that holds it at
    `path`."""
    tree = Tree()
    name = f"override {dotted(path)}"
    try:
        node = _reader().compose(text)
    except (YAMLError, RecursionError) as error:
        tree.problems.append(
            f"{name}: is not YAML: {_reason(error)} ({text}); quote it, or look at its brackets"
        )
        return tree
    value = None if node is None else _value(node, path, "", tree, ())
    for key in reversed(path):
        value = {key: value}
    tree.values = value if isinstance(value, dict) else {}
    tree.origins = {at: Origin("override") for at in {path, *tree.origins}}
    return tree


def _reader() -> YAML:
    return YAML(typ="safe", pure=True)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _value(node: Node, path: KeyPath, file: str, tree: Tree, above: tuple[Node, ...]) -> Any:
    if any(node is other for other in above):
        tree.problems.append(f"{file}:{_line(node)}: {dotted(path)}: refers to itself; write the value out")
        return None
    if isinstance(node, MappingNode):
        return _mapping(node, path, file, tree, (*above, node))
    if isinstance(node, SequenceNode):
        entries = []
        for position, entry in enumerate(node.value):
            tree.origins[(*path, position)] = Origin("file", file, _line(entry))
            entries.append(_value(entry, (*path, position), file, tree, (*above, node)))
        return entries
    return _scalar(node, path, file, tree)


def _mapping(
    node: MappingNode, path: KeyPath, file: str, tree: Tree, above: tuple[Node, ...]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = _line(key_node)
        where = f"{file}:{line}: " if file else "override "
        if not isinstance(key_node, ScalarNode) or key_node.tag != _TAG + "str":
            shown = key_node.value if isinstance(key_node, ScalarNode) else "a list or mapping"
            tree.problems.append(
                f"{where}{dotted(path) or 'the file'}: a key must be a word ({shown}); write `key: value`"
            )
            continue
        key = str(key_node.value)
        here = (*path, key)
        if key in lines:
            tree.problems.append(
                f"{where}{dotted(here)}: is there twice (first in line {lines[key]}); keep one of them"
            )
            continue
        lines[key] = line
        tree.origins[here] = Origin("file", file, line)
        values[key] = _value(value_node, here, file, tree, above)
    return values


def _scalar(node: Node, path: KeyPath, file: str, tree: Tree) -> Any:
    text = str(node.value)
    kind = str(node.tag).removeprefix(_TAG)
    where = f"{file}:{_line(node)}: {dotted(path)}" if file else f"override {dotted(path)}"
    if kind in ("str", "timestamp"):  # the core schema of YAML 1.2 knows no dates
        if "\0" in text:  # which no path may hold
            tree.problems.append(f"{where}: holds the character \\0; take it out")
        return text.replace("\0", "")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float"):
        try:
            return _int(text) if kind == "int" else _float(text)
        except ValueError:  # behind a tag anything can stand, and Python refuses thousands of digits
            short = text if len(text) <= 40 else f"{text[:40]}..."
            tree.problems.append(f"{where}: {short} cannot be read as a number; for example 1")
            return None
    tree.problems.append(f"{where}: the tag {node.tag} is not known; leave it out")
    return None


def _int(text: str) -> int:
    digits = text.replace("_", "")
    return int(digits, 0) if digits.lstrip("+-").lower().startswith(("0x", "0o", "0b")) else int(digits)


def _float(text: str) -> float:
    number = text.replace("_", "").lower()
    if number.lstrip("+-") == ".inf":
        return -math.inf if number.startswith("-") else math.inf
    return math.nan if number == ".nan" else float(number)


def _reason(error: YAMLError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "its brackets or sections are nested too deeply"
    parts = [
        getattr(error, "context", None),
        getattr(error, "problem", None) or getattr(error, "reason", None),
    ]
    return ", ".join(str(part) for part in parts if part) or "it holds a character that YAML does not allow"


def _syntax_problem(error: YAMLError | RecursionError, file: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None or "end" in str(getattr(error, "problem", "")):  # what was never closed began elsewhere
        mark = getattr(error, "context_mark", None) or mark
    place = f"{file}:{mark.line + 1}" if mark is not None else file
    return (
        f"{place}: this is not YAML: {_reason(error)}; look at the brackets, quotes and indentation around it"
    )
