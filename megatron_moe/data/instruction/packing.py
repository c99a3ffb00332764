"""Which records stand together in a sequence."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sequences:
    """Sequences of one record or several."""

    members: NDArray[np.int64]
    """[n] records, those of a sequence one after the other."""
    begins: NDArray[np.int64]
    """[sequences + 1] first member of each."""

    def __len__(self) -> int:
        return len(self.begins) - 1

    def of(self, index: int) -> NDArray[np.int64]:
        """The records of a sequence."""
        return self.members[self.begins[index] : self.begins[index + 1]]


def one_each(count: int) -> Sequences:
    """A sequence for each record, in their order."""
    return Sequences(np.arange(count), np.arange(count + 1))


def packed(places: NDArray[np.int64], room: int, seed: int) -> Sequences:
    """Records in as few sequences of `room` places as best-fit decreasing finds (at most 11/9 of the fewest):
    the longest first, each where it leaves the least room.

    The seed decides which of equally long ones stand together, and the order of the sequences, so that those
    with many short records do not all come at the end.

    Args:
        places: [n] that each record takes, at most `room`.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 0x9AC]))
    order = generator.permutation(len(places))
    order = order[np.argsort(-places[order], kind="stable")]
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # those that bins have left, ascending
    for record, size in zip(order.tolist(), places[order].tolist(), strict=True):
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            bins.append([record])
            chosen, left = len(bins) - 1, room - size
        else:
            left = rooms[at] - size
            chosen = with_room[rooms[at]].pop()
            bins[chosen].append(record)
            if not with_room[rooms[at]]:
                del rooms[at]
        if left:
            if not with_room.setdefault(left, []):
                bisect.insort(rooms, left)
            with_room[left].append(chosen)
    shuffled = [bins[at] for at in generator.permutation(len(bins)).tolist()]
    counts = np.array([len(members) for members in shuffled], np.int64)
    return Sequences(
        np.array([record for members in shuffled for record in members], np.int64),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
    )
