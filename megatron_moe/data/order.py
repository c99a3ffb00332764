"""Which sample comes when: functions of the seed and of the sample's number in the run, and of nothing else.

Each can be asked for any number without those before it, so that a run goes on anywhere at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_WINDOW = 1024


class Order(Protocol):
    """Sample i of a run, as an index into a dataset."""

    def __getitem__(self, index: int) -> int: ...


class SampleOrder:
    """Sample i of a run, as an index into a dataset of `length` samples: epoch i // length, and there a place
    in its order."""

    def __init__(self, length: int, seed: int, shuffle: bool, name: str = "") -> None:
        """`name`: sources of other names get other orders, of the same length too."""
        self._length = length
        self._seed = seed
        self._name = list(name.encode())
        self._shuffle = shuffle
        self._epoch = -1
        self._permutation: NDArray[Any] = np.zeros(0, np.uint32)

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self._length)
        if not self._shuffle:
            return place
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch, *self._name]))
            self._permutation = generator.permutation(np.arange(self._length, dtype=np.uint32))
            self._epoch = epoch
        return int(self._permutation[place])


class Interleaving:
    """Which source each sample comes from, and which one of that source's own it is.

    The k-th sample (from 0) of a source with share w of the samples is due at (k + 1/2) / w, and samples come
    in the order in which they are due, those due at once in the order of the sources: the method of
    Sainte-Lague. Of the first i samples source j has w_j i, give or take (1 + w_j J) / 2 for J sources.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: finite, not negative, one at least positive."""
        total = sum(weights)
        self._shares = np.array([weight / total for weight in weights], np.float64)
        self._window = self._window_from(0)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, place in the order of the source's samples) of sample `index` of the run."""
        window = self._at(index)
        at = index - window.begin
        return int(window.sources[at]), int(window.places[at])

    def taken(self, samples: int) -> list[int]:
        """How many of the first `samples` samples of a run come from each source."""
        window = self._at(samples)
        here = np.bincount(window.sources[: samples - window.begin], minlength=len(self._shares))
        counts: list[int] = (window.before + here).tolist()
        return counts

    def _at(self, index: int) -> _Window:
        begin = index // _WINDOW * _WINDOW
        if begin != self._window.begin:
            self._window = self._window_from(begin)
        return self._window

    def _window_from(self, begin: int) -> _Window:
        around = len(self._shares)  # by time t, t samples are due, give or take half a sample for each source
        due: list[NDArray[np.float64]] = []
        sources: list[NDArray[np.int64]] = []
        places: list[NDArray[np.int64]] = []
        before = np.zeros(len(self._shares), np.int64)
        for source, share in enumerate(self._shares.tolist()):
            if share == 0:
                continue
            before[source] = _due_before(begin - around, share)
            place = np.arange(before[source], _due_before(begin + _WINDOW + around, share), dtype=np.int64)
            due.append(_due(place, share))
            sources.append(np.full(place.size, source, np.int64))
            places.append(place)
        of = np.concatenate(sources)
        in_turn = np.lexsort((of, np.concatenate(due)))
        skipped = begin - int(before.sum())
        before += np.bincount(of[in_turn[:skipped]], minlength=before.size)
        inside = in_turn[skipped:][:_WINDOW]
        return _Window(begin, before, of[inside], np.concatenate(places)[inside])


@dataclass(frozen=True)
class _Window:
    """The samples of a run from number `begin` on."""

    begin: int
    before: NDArray[np.int64]
    """[sources] samples of each before this window."""
    sources: NDArray[np.int64]
    """[window]"""
    places: NDArray[np.int64]
    """[window]"""


def _due(place: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    due: NDArray[np.float64] = (place + np.float64(0.5)) / np.float64(share)
    return due


def _due_before(time: float, share: float) -> int:
    """Samples of a source that are due before `time`, by the very numbers that they are sorted by."""
    count = max(0, int(share * time + 0.5) - 1)
    while (count + 0.5) / share < time:
        count += 1
    return count
