"""From a YAML file to a validated, complete experiment; every mistake in it is reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config import overrides as override_arguments
from megatron_moe.config.checking import check
from megatron_moe.config.defaults import attempt
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.extends import read_text, read_with_bases
from megatron_moe.config.keys import leaves
from megatron_moe.config.origin import DEFAULT, Origin, dotted
from megatron_moe.config.rules import violations
from megatron_moe.config.schema import Experiment


@dataclass(frozen=True)
class Loaded:
    """An experiment and where it came from."""

    experiment: Experiment
    """Validated, with every derived default filled."""
    text: str
    """The user's own YAML, to the letter. What `extends` and overrides added is in the experiment only."""
    provenance: Mapping[str, Origin]
    """Dotted key of each value -> where it came from."""


def load(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Loaded:
    """Read, compose, override, check and complete an experiment.

    `overrides`: `section.key=value`, the value a YAML 1.2 scalar, list or mapping. `world_size`: the number
    of ranks where it is given from outside. Raises ConfigError with all problems, in the order of the file.
    """
    file = str(path)
    text = read_text(file)
    tree = read_with_bases(file, text)
    if not tree.values and tree.problems:
        raise ConfigError(*tree.problems)
    override_arguments.apply(tree, overrides)
    checked = check(tree.values, tree.origins, file, tree.incomplete)
    filled = attempt(checked.experiment, world_size, partial=bool(checked.broken))
    experiment, derived = filled.experiment, filled.derived
    found = [] if tree.incomplete else filled.problems + violations(experiment, filled.partial)
    values = dict(leaves(experiment))
    written = {dotted(path): origin for path, origin in tree.origins.items()}
    provenance = {
        key: _derived(derived[key]) if key in derived else written.get(key, DEFAULT) for key in values
    }
    problems = tree.problems + checked.problems
    values |= filled.as_written
    problems += [problem.render(values, written | provenance, file) for problem in found]
    if problems:
        raise ConfigError(*sorted(problems, key=_position))
    return Loaded(experiment, text, provenance)


def _derived(keys: tuple[str, ...]) -> Origin:
    """A default that follows from no other key is one like those in the schema."""
    return Origin("derived", keys=keys) if keys else DEFAULT


def _position(problem: str) -> tuple[bool, str, int]:
    """Sorts lines by file and line number; what has no line comes last."""
    name, _, rest = problem.partition(":")
    number = rest.partition(":")[0]
    return (False, name, int(number)) if number.isdigit() else (True, "", 0)
