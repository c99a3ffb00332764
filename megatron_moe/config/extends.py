"""One file and the files it extends, as one tree: mappings are merged key by key, everything else is replaced
by the later."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.keys import in_tree, input_paths, meant_variant, required_sections, unions, value_at
from megatron_moe.config.origin import KeyPath, Origin
from megatron_moe.config.yaml_tree import Tree, parse


def read_text(path: str) -> str:
    """The file's text. Raises ConfigError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; name an existing YAML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); check the name and its permissions") from None


def read_with_bases(path: str, text: str) -> Tree:
    """The merged tree of `text`, the content of `path`, over the files that its `extends` names."""
    return _read(path, text, ())


def files_of(path: str) -> list[str]:
    """The file, and all that it extends and can be read. Raises ConfigError where itself cannot be."""
    found: list[str] = []

    def follow(file: str, text: str) -> None:
        found.append(file)
        own = parse(text, file)
        for name in _names(own.values.get("extends"), file, own):
            base = os.path.join(os.path.dirname(file), os.path.expanduser(name))
            if any(os.path.realpath(base) == os.path.realpath(other) for other in found):
                continue
            with suppress(ConfigError):
                follow(base, read_text(base))

    follow(path, read_text(path))
    return found


def _read(path: str, text: str, above: tuple[str, ...]) -> Tree:
    own = parse(text, path)
    bases = own.values.pop("extends", None)
    _open_empty_sections(own.values)
    resolve_paths(own.values, os.path.dirname(os.path.abspath(path)))
    merged = Tree()
    line = own.origins.pop(("extends",), Origin("file", path, 1)).line
    for name in _names(bases, f"{path}:{line}", own):
        base = os.path.join(os.path.dirname(path), os.path.expanduser(name))
        chain = (*above, path)
        if any(os.path.realpath(base) == os.path.realpath(other) for other in chain):
            circle = " -> ".join((*chain, base))
            own.problems.append(f"{path}:{line}: extends: goes round in a circle ({circle}); take {name} out")
            merged.incomplete = True
            continue
        try:
            text_below = read_text(base)
        except ConfigError as error:
            own.problems += [f"{path}:{line}: extends: {problem}" for problem in error.problems]
            merged.incomplete = True
            continue
        merge(merged, _read(base, text_below, chain))
    merge(merged, own)
    return merged


def _names(bases: Any, place: str, tree: Tree) -> list[str]:
    names = [bases] if isinstance(bases, str) else bases
    if names is None:
        return []
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return names
    tree.problems.append(
        f"{place}: extends: must be a file name or a list of them ({bases}); for example [base.yaml]"
    )
    tree.incomplete = True
    return []


def _open_empty_sections(values: dict[str, Any]) -> None:
    """A section whose keys are all commented out reads as null and means: nothing set here."""
    for key in (key for known in required_sections() for key in in_tree(values, known)):
        section, _, name = key.rpartition(".")
        holder = value_at(values, section) if section else values
        if isinstance(holder, dict) and name in holder and holder[name] is None:
            holder[name] = {}


def merge(tree: Tree, later: Tree) -> None:
    """Lay `later` over `tree`, in place."""
    tree.problems += later.problems
    tree.incomplete |= later.incomplete
    _merge(tree.values, later.values, (), tree, later)


def _merge(values: dict[str, Any], later: dict[str, Any], path: KeyPath, tree: Tree, over: Tree) -> None:
    for key, value in later.items():
        here = (*path, key)
        if isinstance(values.get(key), dict) and isinstance(value, dict) and _alike(here, values[key], value):
            if here in over.origins:
                tree.origins[here] = over.origins[here]
            _merge(values[key], value, here, tree, over)
            continue
        for old in [other for other in tree.origins if other[: len(here)] == here]:
            del tree.origins[old]
        tree.origins |= {
            other: origin for other, origin in over.origins.items() if other[: len(here)] == here
        }
        values[key] = value


def _alike(path: KeyPath, earlier: dict[str, Any], later: dict[str, Any]) -> bool:
    """Whether two sections are of one kind, so that one can be laid over the other; else it replaces it."""
    variants = unions().get(".".join(map(str, path)))
    return variants is None or meant_variant(variants, earlier) is meant_variant(variants, later)


def resolve_paths(values: dict[str, Any], folder: str) -> None:
    """Make the input paths of a tree absolute, in place, taking relative ones from `folder`."""
    for key in (key for known in input_paths() for key in in_tree(values, known)):
        section, _, name = key.rpartition(".")
        holder = value_at(values, section)
        if not isinstance(holder, dict) or name not in holder:
            continue
        value = holder[name]
        if isinstance(value, list):
            holder[name] = [_absolute(entry, folder) for entry in value]
        else:
            holder[name] = _absolute(value, folder)


def _absolute(path: Any, folder: str) -> Any:
    if not isinstance(path, str) or not path:
        return path
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))
