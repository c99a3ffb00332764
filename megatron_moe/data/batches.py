"""Which samples a step trains on, and a replica's share of them as microbatches.

The order is a function of the seed and of the number of samples consumed, and of nothing else: not of the
length of the run, of the number of replicas or of the micro batch size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_moe.data.blend import Blend
from megatron_moe.data.order import Order, SampleOrder
from megatron_moe.data.samples import Samples


def order_of(dataset: Samples, seed: int, shuffle: bool) -> Order:
    """Sample i of a run, as an index into the dataset."""
    if isinstance(dataset, Blend):
        return dataset.order(seed, shuffle)
    return SampleOrder(len(dataset), seed, shuffle)


class Microbatches:
    """One replica's microbatches, without end, from `consumed_samples` on.

    Microbatch m of replica r in global batch g holds the samples g x GBS + m x (MBS x DP) + r x MBS and the
    MBS - 1 after it. So a global batch falls into the same microbatches for every DP. Each is a dict of the
    samples' tensors, stacked to [b, s], and `sample_numbers` [b], these numbers.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        seed: int,
        consumed_samples: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        shuffle: bool = True,
    ) -> None:
        """`shuffle` False: the samples in the dataset's order, as validation wants them."""
        assert global_batch_size % (micro_batch_size * data_parallel_size) == 0, (
            "global batch must divide into microbatches"
        )
        assert 0 <= data_parallel_rank < data_parallel_size
        self._dataset = dataset
        self._order = order_of(dataset, seed, shuffle)
        self._micro_batch_size = micro_batch_size
        self._stride = micro_batch_size * data_parallel_size
        # A global batch is a whole number of strides, so it need not be counted.
        self._next = consumed_samples + data_parallel_rank * micro_batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        numbers = range(self._next, self._next + self._micro_batch_size)
        samples = [self._dataset[self._order[number]] for number in numbers]
        self._next += self._stride
        stacked = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        return {**stacked, "sample_numbers": torch.tensor(numbers)}
