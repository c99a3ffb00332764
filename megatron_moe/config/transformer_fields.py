"""The fields of the installed Megatron-Core's `TransformerConfig`, read from its source without importing it.

Importing the class would import torch, which costs seconds and is not there on a login node.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

_SOURCES = (
    ("core/model_parallel_config.py", "ModelParallelConfig"),
    ("core/transformer/transformer_config.py", "TransformerConfig"),
)
_SCALARS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


class NotInstalled(Exception):
    """megatron-core is not installed, so that its fields are not known."""


@cache
def transformer_fields() -> dict[str, ast.expr]:
    """Field name -> annotation, of `TransformerConfig` and the class it inherits from. Raises
    NotInstalled."""
    fields: dict[str, ast.expr] = {}
    for file, class_name in _SOURCES:
        for node in ast.parse(_source(file)).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                fields |= {
                    statement.target.id: statement.annotation
                    for statement in node.body
                    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
                }
    return {name: annotation for name, annotation in fields.items() if not name.startswith("_")}


def _source(file: str) -> str:
    spec = importlib.util.find_spec("megatron")  # a namespace package: finding it runs none of its code
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / file
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise NotInstalled


def accepts(annotation: ast.expr, value: Any) -> bool:
    """Whether a value read from YAML fits an annotation; types that YAML cannot hold fit nothing."""
    if isinstance(annotation, ast.Constant):
        return annotation.value is None and value is None
    if isinstance(annotation, ast.Name):
        return _is_scalar(annotation.id, value)
    if isinstance(annotation, ast.BinOp):
        return accepts(annotation.left, value) or accepts(annotation.right, value)
    if not isinstance(annotation, ast.Subscript):
        return False
    name, arguments = _name(annotation.value), _arguments(annotation)
    if name == "Optional":
        return value is None or accepts(arguments[0], value)
    if name == "Union":
        return any(accepts(part, value) for part in arguments)
    if name == "Literal":
        choices = [part.value for part in arguments if isinstance(part, ast.Constant)]
        return any(value == choice and type(value) is type(choice) for choice in choices)
    if name.lower() == "list":
        return isinstance(value, list) and all(accepts(arguments[0], entry) for entry in value)
    if name.lower() == "tuple":
        return (
            isinstance(value, list)
            and len(value) == len(arguments)
            and all(accepts(part, entry) for part, entry in zip(arguments, value, strict=True))
        )
    return False


def describe(annotation: ast.expr) -> str | None:
    """The annotation in words, None where no YAML value fits it (functions, torch types, enumerations)."""
    if isinstance(annotation, ast.Constant):
        return "null" if annotation.value is None else None
    if isinstance(annotation, ast.Name):
        return _SCALARS.get(annotation.id)
    if isinstance(annotation, ast.BinOp):
        return _either([annotation.left, annotation.right])
    if not isinstance(annotation, ast.Subscript):
        return None
    name, arguments = _name(annotation.value), _arguments(annotation)
    if name == "Optional":
        inner = describe(arguments[0])
        return None if inner is None else f"{inner}, or null"
    if name == "Union":
        return _either(arguments)
    if name == "Literal":
        return "one of " + ", ".join(str(part.value) for part in arguments if isinstance(part, ast.Constant))
    if name.lower() == "list":
        inner = describe(arguments[0])
        return None if inner is None else f"a list, each entry {inner}"
    return f"a list of {len(arguments)} entries" if name.lower() == "tuple" else None


def _either(parts: list[ast.expr]) -> str | None:
    described = [words for part in parts if (words := describe(part)) is not None]
    return ", or ".join(described) if described else None


def _is_scalar(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return name == "bool"
    if name == "float":
        return isinstance(value, int | float)
    return (name == "int" and isinstance(value, int)) or (name == "str" and isinstance(value, str))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _arguments(node: ast.Subscript) -> list[ast.expr]:
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
