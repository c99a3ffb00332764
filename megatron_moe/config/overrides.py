"""`section.key=value` arguments of the command line, laid over the tree of the file."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_moe.config.checking import unknown_key
from megatron_moe.config.extends import merge, resolve_paths
from megatron_moe.config.keys import FREE_MAPPING, schema_key
from megatron_moe.config.yaml_tree import Tree, parse_value


def apply(tree: Tree, overrides: Sequence[str]) -> None:
    """Lay the overrides over `tree` in order, in place; what is wrong with them is added to its problems.

    A mapping is merged into the section that is there; a section that is null, such as `moe`, is opened.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        free = key.removeprefix(f"{FREE_MAPPING}.")
        if not equals or not key:
            advice = "write section.key=value, for example training.train_iters=20"
            tree.problems.append(f"override {override}: is no assignment; {advice}")
        elif key == "extends":
            tree.problems.append(
                "override extends: files are composed by the YAML file alone; write extends there"
            )
        elif schema_key(key) is not None:
            _lay_over(tree, text, tuple(key.split(".")))
        elif free and free != key:
            _lay_over(tree, text, (*FREE_MAPPING.split("."), free))
        else:
            tree.problems.append(unknown_key(key, "override "))


def _lay_over(tree: Tree, text: str, path: tuple[str, ...]) -> None:
    later = parse_value(text.strip(), path)
    resolve_paths(later.values, os.getcwd())
    merge(tree, later)
