"""The order in which ranks run their passes, against Megatron-Core's own schedules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_moe.plan.schedules.in_flight import peaks
from megatron_moe.plan.schedules.orders import Op, order_of


def warmup_of_megatron(rank: int, pipeline_size: int, chunks: int, num_microbatches: int) -> int:
    """Forwards before the first backward's own one, by Megatron-Core's function."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pipeline_size, rank=lambda: rank),
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )
    _, _, warmup, _ = get_pp_rank_microbatches(
        num_microbatches, chunks, pipeline_size, p2p_communicator=communicator
    )
    return min(int(warmup), num_microbatches * chunks)


def order_of_megatron(rank: int, pipeline_size: int, chunks: int, num_microbatches: int) -> list[Op]:
    """As the loops of `forward_backward_pipelining_with(out)_interleaving` go through the schedule table."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(num_microbatches, chunks, pipeline_size)
    warmup = warmup_of_megatron(rank, pipeline_size, chunks, num_microbatches)

    def forward(k: int) -> Op:
        microbatch, chunk = table[k]
        return Op("F", chunk * pipeline_size + rank, microbatch)

    def backward(k: int) -> Op:
        microbatch, chunk = table[k]
        return Op("B", (chunks - 1 - chunk) * pipeline_size + rank, microbatch)

    order = [forward(k) for k in range(warmup)]
    for k in range(len(table) - warmup):
        order += [forward(k + warmup), backward(k)]
    return order + [backward(k) for k in range(len(table) - warmup, len(table))]


@pytest.mark.second_pair
@pytest.mark.parametrize(
    ("pipeline_size", "chunks", "num_microbatches"),
    [(2, 2, 2), (2, 2, 8), (4, 2, 4), (4, 2, 12), (4, 3, 16), (8, 4, 24), (3, 5, 9)],
)
def test_interleaved_ranks_run_in_the_order_of_megatron(
    pipeline_size: int, chunks: int, num_microbatches: int
) -> None:
    """Chunks, microbatches, warm-up and cool-down of every rank."""
    for rank in range(pipeline_size):
        ours = order_of("interleaved", rank, pipeline_size, chunks, num_microbatches)
        assert ours == order_of_megatron(rank, pipeline_size, chunks, num_microbatches)


@pytest.mark.second_pair
@pytest.mark.parametrize(("pipeline_size", "num_microbatches"), [(2, 1), (4, 2), (4, 4), (4, 11), (8, 32)])
def test_1f1b_ranks_run_in_the_order_of_megatron(pipeline_size: int, num_microbatches: int) -> None:
    """With fewer microbatches than stages, too."""
    for rank in range(pipeline_size):
        ours = order_of("1f1b", rank, pipeline_size, 1, num_microbatches)
        assert ours == order_of_megatron(rank, pipeline_size, 1, num_microbatches)


@pytest.mark.parametrize("name", ["1f1b", "interleaved"])
def test_peaks_hold_the_moment_with_the_most_bytes(name: str) -> None:
    """For chunks that keep different amounts, the most over all moments is among those given."""
    pipeline_size, chunks, num_microbatches = 4, 1 if name == "1f1b" else 3, 12
    for rank in range(pipeline_size):
        for kept in ([1.0, 1.0, 1.0], [5.0, 1.0, 0.0], [0.0, 2.0, 3.0], [1.0, 0.0, 7.0]):
            most = now = 0.0
            for op in order_of(name, rank, pipeline_size, chunks, num_microbatches):
                now += kept[op.stage // pipeline_size] * (1 if op.kind == "F" else -1)
                most = max(most, now)
            moments = peaks(name, rank, pipeline_size, chunks, num_microbatches)
            assert max(
                sum(a * b for a, b in zip(moment, kept, strict=False)) for moment in moments
            ) == pytest.approx(most)
