"""Which keys of the schema a piece of Python source reads: followed through names, without running it.

A value is taken for a section where an annotation says so, where it is an attribute named `experiment`, or
where it was taken from such a value. Reading is `section.key`, and `getattr(section, name)` with names that
stand in the source; setting, text and comments are not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.keys import NAME, hints, named_section_in, section_in, variants_in
from megatron_moe.config.schema import Experiment, Section

Read = tuple[str, str]
"""Name of a section's class, and of one of its fields."""


@dataclass(frozen=True)
class Holder:
    """What is known of a value: a section, or (`many`) a container of such sections."""

    section: type[Section]
    many: bool = False


def keys_of(root: type[Section] = Experiment, prefix: str = "") -> dict[Read, str]:
    """Every field that holds a value, not a section -> its dotted key; where a section stands in several
    places, its first."""
    found: dict[Read, str] = {}
    inside: dict[Read, str] = {}
    for name, annotation in hints(root).items():
        section, named = section_in(annotation), named_section_in(annotation)
        if section is None:
            found[root.__name__, name] = prefix + name
        if section is not None:
            inside = keys_of(section, f"{prefix}{name}.") | inside
        elif named is not None:
            inside |= {
                read: key
                for read, key in keys_of(named, f"{prefix}{name}.{NAME}.").items()
                if read not in inside
            }
        for variant in variants_in(annotation):
            inside = keys_of(variant, f"{prefix}{name}.") | inside
    return inside | found


def sections_of(root: type[Section] = Experiment) -> dict[str, type[Section]]:
    """Name -> class of `root` and of all sections in it."""
    found = {root.__name__: root}
    for annotation in hints(root).values():
        inner = section_in(annotation) or named_section_in(annotation)
        for section in variants_in(annotation) if inner is None else (inner,):
            if section.__name__ not in found:
                found |= sections_of(section)
    return found


def reads(sources: Iterable[str], root: type[Section] = Experiment) -> set[Read]:
    """All reads in some files, which may call each other's functions."""
    files = [(tree, _imported(tree, sections_of(root))) for tree in map(ast.parse, sources)]
    returns: dict[str, set[Holder | None]] = {}
    for tree, known in files:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                returns.setdefault(node.name, set()).add(_annotated(node.returns, known))
    # A name that functions of several kinds share says nothing.
    sure = {name: held for name, (held, *others) in returns.items() if held is not None and not others}
    found: set[Read] = set()
    for tree, known in files:
        _Scope(root, known, sure, found).body(tree.body)
    return found


def called(source: str, names: Iterable[str]) -> str:
    """The source of the named functions of a file, of those in it that they call, and of its imports."""
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    wanted, waiting = set(), set(names) & functions.keys()
    while waiting:
        wanted |= waiting
        used = {
            node.id for name in waiting for node in ast.walk(functions[name]) if isinstance(node, ast.Name)
        }
        waiting = used & functions.keys() - wanted
    kept = [
        node for node in tree.body if isinstance(node, ast.ImportFrom) or getattr(node, "name", "") in wanted
    ]
    return ast.unparse(ast.Module(kept, []))


def _imported(tree: ast.Module, sections: dict[str, type[Section]]) -> dict[str, type[Section]]:
    """The sections by the names that a file gives them."""
    return {
        alias.asname or alias.name: sections[alias.name]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_moe.config.schema")
        for alias in node.names
        if alias.name in sections
    }


def _annotated(annotation: ast.expr | None, known: dict[str, type[Section]]) -> Holder | None:
    """`Prepare | None` is a Prepare, `Mapping[str, Source]` a container of Sources."""
    if annotation is None:
        return None
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    inside = {
        id(part)
        for node in ast.walk(annotation)
        if isinstance(node, ast.Subscript)
        for part in ast.walk(node.slice)
    }
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in known:
                return Holder(known[name], many=id(node) in inside)
    return None


class _Scope:
    """One function or module: names, and what they hold."""

    def __init__(
        self,
        root: type[Section],
        known: dict[str, type[Section]],
        returns: dict[str, Holder],
        found: set[Read],
        above: _Scope | None = None,
    ) -> None:
        self.root, self.known, self.returns, self.found = root, known, returns, found
        self.names: dict[str, Holder] = dict(above.names) if above is not None else {}
        self.texts: dict[str, list[str]] = dict(above.texts) if above is not None else {}

    def body(self, statements: list[Any]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            self.function(node)
        elif isinstance(node, ast.Assign):
            self.statement(node.value)
            for target in node.targets:
                self.assign(target, node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.value is not None:
                self.statement(node.value)
            if (held := _annotated(node.annotation, self.known)) is not None:
                self.names[node.target.id] = held
        elif isinstance(node, ast.For | ast.comprehension):
            self.statement(node.iter)
            self.bind(node.target, self.element(node.iter))
            if isinstance(node.target, ast.Name):
                self.texts[node.target.id] = self.texts_in(node.iter)
            for child in [
                *getattr(node, "body", []),
                *getattr(node, "orelse", []),
                *getattr(node, "ifs", []),
            ]:
                self.statement(child)
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            inner = _Scope(self.root, self.known, self.returns, self.found, self)
            for generator in node.generators:
                inner.statement(generator)
            parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            inner.body(parts)
        elif isinstance(node, ast.NamedExpr):
            self.statement(node.value)
            self.assign(node.target, node.value)
        else:
            self.visit(node)

    def visit(self, node: ast.AST) -> None:
        """Note what an expression, or each part of a statement, reads."""
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            held = self.held(node.args[0])
            if held is not None and not held.many:
                for name in self.texts_in(node.args[1]):
                    if name in held.section.model_fields:
                        self.found.add((held.section.__name__, name))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            held = self.held(node.value)
            if held is not None and not held.many and node.attr in held.section.model_fields:
                self.found.add((held.section.__name__, node.attr))
        for child in ast.iter_child_nodes(node):
            self.statement(child)

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        inner = _Scope(self.root, self.known, self.returns, self.found, self)
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            held = _annotated(argument.annotation, self.known)
            if held is None and isinstance(node, ast.Lambda) and argument.arg in ("e", "experiment"):
                held = Holder(self.root)
            inner.names.pop(argument.arg, None)
            if held is not None:
                inner.names[argument.arg] = held
        inner.body(node.body if isinstance(node.body, list) else [node.body])

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        pairs: Iterator[tuple[ast.expr, ast.expr]] = iter([(target, value)])
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = zip(target.elts, value.elts, strict=False)
        for one, its in pairs:
            self.bind(one, self.held(its))
            if isinstance(one, ast.Name):
                self.texts[one.id] = self.texts_in(its)

    def bind(self, target: ast.expr, held: Holder | None) -> None:
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                self.names.pop(name.id, None)
                if held is not None:
                    self.names[name.id] = held

    def texts_in(self, node: ast.expr) -> list[str]:
        """The texts that an expression may be, or hold."""
        if isinstance(node, ast.Name):
            return self.texts.get(node.id, [])
        parts = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
        return [
            part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]

    def held(self, node: ast.expr) -> Holder | None:
        """What an expression holds, as far as it is known."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            if node.attr in ("experiment", "_experiment"):
                return Holder(self.root)
            if getattr(node.value, "id", "") == "self":
                # What keeps a section calls it by its name.
                return self.member(Holder(self.root), node.attr)
            return self.member(self.held(node.value), node.attr)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("items", "values", "get"):
                held = self.held(node.func.value)
                return held if held is None or node.func.attr != "get" else Holder(held.section)
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            return self.returns.get(name)
        if isinstance(node, ast.Subscript):
            held = self.held(node.value)
            return Holder(held.section) if held is not None and held.many else None
        if isinstance(node, ast.BoolOp):
            return next((held for part in node.values if (held := self.held(part)) is not None), None)
        if isinstance(node, ast.IfExp):
            return self.held(node.body) or self.held(node.orelse)
        if isinstance(node, ast.NamedExpr):
            return self.held(node.value)
        return None

    def member(self, held: Holder | None, name: str) -> Holder | None:
        if held is None or held.many or name not in held.section.model_fields:
            return None
        annotation = hints(held.section)[name]
        if (section := section_in(annotation)) is not None:
            return Holder(section)
        named = named_section_in(annotation)
        return None if named is None else Holder(named, many=True)

    def element(self, node: ast.expr) -> Holder | None:
        """What one element of an iterable holds."""
        held = self.held(node)
        return Holder(held.section) if held is not None and held.many else None
