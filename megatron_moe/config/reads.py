"""Which keys a function of an experiment reads: what a derived default follows from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from megatron_moe.config.schema import Experiment, Section

_T = TypeVar("_T")
_A = TypeVar("_A")


def with_reads(
    function: Callable[[Experiment, _A], _T], experiment: Experiment, argument: _A
) -> tuple[_T, tuple[str, ...]]:
    """What `function` returns for the experiment, and the dotted keys that it read, in that order."""
    keys: dict[str, None] = {}
    result = function(cast(Experiment, _Recorder(experiment, "", keys)), argument)
    return result, tuple(keys)


class _Recorder:
    """Stands for a section, and notes each value that is taken from it."""

    def __init__(self, section: Section, prefix: str, keys: dict[str, None]) -> None:
        self._section, self._prefix, self._keys = section, prefix, keys

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._section, name)
        key = self._prefix + name
        if isinstance(value, Section):
            return _Recorder(value, f"{key}.", self._keys)
        self._keys[key] = None
        return value
