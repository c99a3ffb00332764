"""The order of samples: a contract that resume, verify and every layout rely on."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_moe.data.batches import Microbatches


class Numbered:
    """A dataset whose samples hold nothing but their index."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        assert 0 <= index < self._length
        return {"tokens": torch.full((3,), index), "loss_mask": torch.ones(3)}


def microbatches(
    length: int,
    rank: int,
    dp: int,
    mbs: int,
    gbs: int,
    consumed: int = 0,
    shuffle: bool = True,
    seed: int = 1,
) -> Microbatches:
    return Microbatches(
        Numbered(length),
        seed=seed,
        consumed_samples=consumed,
        data_parallel_rank=rank,
        data_parallel_size=dp,
        micro_batch_size=mbs,
        global_batch_size=gbs,
        shuffle=shuffle,
    )


def samples(batches: Microbatches, count: int) -> list[tuple[int, ...]]:
    """The sample numbers of the next `count` microbatches."""
    return [tuple(batch["tokens"][:, 0].tolist()) for batch in islice(batches, count)]


@given(
    length=st.integers(1, 30),
    mbs=st.integers(1, 3),
    dp=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    consumed_batches=st.integers(0, 5),
    seed=st.integers(0, 2**40),
)
def test_each_replica_gets_what_the_contract_says(
    length: int, mbs: int, dp: int, accumulation: int, consumed_batches: int, seed: int
) -> None:
    gbs = mbs * dp * accumulation
    steps = 3
    end = (consumed_batches + steps) * gbs
    order = [
        index
        for epoch in range(end // length + 1)
        for index in np.random.Generator(np.random.PCG64([seed, epoch])).permutation(length).tolist()
    ]
    for rank in range(dp):
        mine = microbatches(length, rank, dp, mbs, gbs, consumed_batches * gbs, seed=seed)
        expected = []
        for step in range(consumed_batches, consumed_batches + steps):
            for microbatch in range(accumulation):
                first = step * gbs + microbatch * mbs * dp + rank * mbs
                expected.append(tuple(order[first : first + mbs]))
        assert samples(mine, steps * accumulation) == expected


def test_samples_are_numbered_by_their_place_in_the_run() -> None:
    numbers = [
        [batch["sample_numbers"].tolist() for batch in islice(microbatches(5, rank, 2, 2, 8, consumed=8), 3)]
        for rank in range(2)
    ]
    assert numbers == [[[8, 9], [12, 13], [16, 17]], [[10, 11], [14, 15], [18, 19]]]


@given(length=st.integers(1, 50), mbs=st.integers(1, 3), parts=st.integers(1, 4))
def test_a_global_batch_falls_into_the_same_microbatches_for_every_dp(
    length: int, mbs: int, parts: int
) -> None:
    gbs = mbs * 12
    splits = []
    for dp in (1, 2, 3, 4, 6, 12):
        per_replica = [
            samples(microbatches(length, rank, dp, mbs, gbs), parts * 12 // dp) for rank in range(dp)
        ]
        steps = [
            sorted(
                micro for replica in per_replica for micro in replica[step * 12 // dp : (step + 1) * 12 // dp]
            )
            for step in range(parts)
        ]
        splits.append(steps)
    assert all(split == splits[0] for split in splits)


@given(consumed=st.integers(0, 60), length=st.integers(1, 20))
def test_resuming_continues_exactly(consumed: int, length: int) -> None:
    whole = samples(microbatches(length, 0, 1, 1, 4), consumed + 20)
    assert samples(microbatches(length, 0, 1, 1, 4, consumed), 20) == whole[consumed:]


def test_a_changed_batch_size_neither_repeats_nor_skips_samples() -> None:
    before = samples(microbatches(100, 0, 1, 2, 4), 6)
    after = samples(microbatches(100, 0, 1, 3, 6, consumed=12), 8)
    seen = [index for batch in before + after for index in batch]
    assert len(set(seen)) == len(seen) == 36


def test_an_epoch_takes_each_sample_once_and_the_next_in_another_order() -> None:
    epochs = np.array(samples(microbatches(40, 0, 1, 1, 1), 120)).reshape(3, 40)
    assert (np.sort(epochs) == np.arange(40)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    other_seed = samples(microbatches(40, 0, 1, 1, 1, seed=2), 40)
    assert [index for (index,) in other_seed] != epochs[0].tolist()


def test_validation_starts_from_the_front_each_time() -> None:
    for _ in range(2):
        assert samples(microbatches(5, 0, 1, 2, 2, shuffle=False), 4) == [(0, 1), (2, 3), (4, 0), (1, 2)]


def test_samples_are_stacked() -> None:
    batch = next(microbatches(9, 0, 1, 4, 4))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == {
        "tokens": ((4, 3), torch.int64),
        "loss_mask": ((4, 3), torch.float32),
        "sample_numbers": ((4,), torch.int64),
    }
