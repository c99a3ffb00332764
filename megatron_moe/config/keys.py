"""The tree of keys that the schema knows, and the key that somebody probably meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from megatron_moe.config.schema import Experiment, Section

FREE_MAPPING = "model.megatron_core"
"""The mapping whose keys the schema does not know."""

NAME = "<name>"
"""Stands in the schema's keys for a name that the user gives: `data.blend.<name>.weight`."""


@cache
def hints(section: type[Section]) -> dict[str, Any]:
    """Key -> annotation of one section, constraints included."""
    names = get_type_hints(section, include_extras=True)
    return {name: names[name] for name in section.model_fields}


def section_in(annotation: Any) -> type[Section] | None:
    """The section behind an annotation such as `MoE | None`; None for a value, also for one that may be a
    section (see `variants_in`)."""
    parts = alternatives(annotation)
    return parts[0] if len(parts) == 1 and _is_section(parts[0]) else None


def variants_in(annotation: Any) -> tuple[type[Section], ...]:
    """The sections that a value such as `float | AdaptiveCoefficient` may be written as; none of others."""
    parts = alternatives(annotation)
    return tuple(part for part in parts if _is_section(part)) if len(parts) > 1 else ()


def meant_variant(variants: tuple[type[Section], ...], given: Mapping[str, Any]) -> type[Section]:
    """The one that knows most of the given keys, the first of several."""
    return max(variants, key=lambda variant: len(given.keys() & variant.model_fields.keys()))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def named_section_in(annotation: Any) -> type[Section] | None:
    """The section behind an annotation such as `dict[str, Source] | None`; None for anything else."""
    for part in alternatives(annotation):
        inner = get_args(part)[0] if get_origin(part) is Annotated else part
        if get_origin(inner) is dict and len(get_args(inner)) == 2:
            return section_in(get_args(inner)[1])
    return None


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without None, or the annotation itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(part for part in get_args(annotation) if part is not type(None))
    return (annotation,)


@cache
def known_keys() -> dict[str, Any]:
    """Dotted key -> annotation, of every section and value of an experiment; `NAME` stands for names that
    the user gives."""
    return dict(_walk(Experiment, ""))


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, annotation in hints(section).items():
        yield prefix + name, annotation
        inner, named = section_in(annotation), named_section_in(annotation)
        if named is not None:
            yield f"{prefix}{name}.{NAME}", named
            yield from _walk(named, f"{prefix}{name}.{NAME}.")
        for section in variants_in(annotation) if inner is None else (inner,):
            yield from _walk(section, f"{prefix}{name}.")


@cache
def named_sections() -> dict[str, type[Section]]:
    """The keys whose value is sections by names of the user's, and what each of these is."""
    return {
        key: named
        for key, annotation in known_keys().items()
        if (named := named_section_in(annotation)) is not None
    }


def schema_key(key: str) -> str | None:
    """The schema's own form of a dotted key: `data.blend.<name>.path` for `data.blend.web.path`. None for an
    unknown key."""
    generic, _ = _without_name(key)
    return generic if generic in known_keys() else None


def _without_name(key: str) -> tuple[str, str | None]:
    """A key with `NAME` in the place of a name of the user's, and that name."""
    for holder in named_sections():
        if key.startswith(f"{holder}."):
            name, dot, rest = key.removeprefix(f"{holder}.").partition(".")
            return f"{holder}.{NAME}{dot}{rest}", name
    return key, None


def in_tree(tree: Any, key: str) -> tuple[str, ...]:
    """The keys that a key of the schema stands for in this tree: one for each name that it has."""
    holder, there, rest = key.partition(f".{NAME}")
    if not there:
        return (key,)
    sections = value_at(tree, holder)
    return tuple(f"{holder}.{name}{rest}" for name in sections) if isinstance(sections, Mapping) else ()


@cache
def unions() -> dict[str, tuple[type[Section], ...]]:
    """The keys whose value may be written as a section or as something else, and these sections."""
    return {
        key: variants for key, annotation in known_keys().items() if (variants := variants_in(annotation))
    }


def union_of(key: str) -> str | None:
    """The key of `unions` that a dotted key is, or lies in."""
    return next((holder for holder in unions() if f"{key}.".startswith(f"{holder}.")), None)


@cache
def required_sections() -> tuple[str, ...]:
    """The sections that cannot be null, as keys of the schema: all that every experiment has, and each that
    has a name."""
    return tuple(
        key
        for key, annotation in known_keys().items()
        if section_in(annotation) is not None and type(None) not in get_args(annotation)
    )


@cache
def input_paths() -> tuple[str, ...]:
    """The schema's keys whose value is a path, or a list of paths, that the experiment reads."""
    return tuple(key for key, annotation in known_keys().items() if _is_path(annotation))


def _is_path(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        extras = (mark.json_schema_extra for mark in marks if isinstance(mark, FieldInfo))
        return any(isinstance(extra, dict) and extra.get("path") == "input" for extra in extras) or _is_path(
            inner
        )
    return any(_is_path(part) for part in get_args(annotation))


def value_at(tree: Any, key: str) -> Any:
    """The value at a dotted key of nested mappings or sections; None where the way there ends."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else getattr(tree, part, None)
        if tree is None:
            return None
    return tree


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in an experiment or in nested mappings that is not itself a section.

    Keys that an incomplete experiment lacks are left out. Sections inside lists are given as mappings.
    """
    if not isinstance(tree, Mapping):
        tree = {name: tree.__dict__[name] for name in type(tree).model_fields if name in tree.__dict__}
    for name, value in tree.items():
        if isinstance(value, Section) or (isinstance(value, Mapping) and value):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield (
                f"{prefix}{name}",
                [dict(entry) if isinstance(entry, Section) else entry for entry in value],
            )
        else:
            yield f"{prefix}{name}", value


def meant(key: str) -> str | None:
    """The known key that `key` is probably a misspelling of: the same name elsewhere, else the closest
    spelling."""
    generic, name = _without_name(key)
    guess = _meant(generic)
    return guess if guess is None or name is None else guess.replace(NAME, name)


def _meant(key: str) -> str | None:
    known = list(known_keys())
    section, _, name = key.rpartition(".")
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    if elsewhere:
        return max(elsewhere, key=lambda other: difflib.SequenceMatcher(None, key, other).ratio())
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return siblings[close[0]]
    names = {other.rpartition(".")[2]: other for other in known}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if close:
        return names[close[0]]
    elsewhere = [other for other in known if not key.startswith(f"{other}.")]
    close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75)
    return close[0] if close else None
