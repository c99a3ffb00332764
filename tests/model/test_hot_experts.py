"""Copies of overloaded experts: whether they pay, and what they compute."""

from __future__ import annotations

import pytest
import torch
from alltoall_on_ranks import Case, alone, run_copied
from distributed import ranks

from megatron_moe.config.schema.moe import Shadowing
from megatron_moe.model.moe.dispatch.hot_experts import worth_copying

SLOW_DEVICE = Shadowing(flops_per_second=1e3, bytes_per_second=1e12)
SLOW_LINK = Shadowing(flops_per_second=1e12, bytes_per_second=1e3)


def by_hand(rows: list[list[int]], settings: Shadowing, copied: set[int]) -> float:
    """Seconds of a microbatch: 4 experts of 400 bytes on 2 ranks, rows of 8 bytes and 100 FLOPs."""
    computed, sent, received = [0, 0], [0, 0], [0, 0]
    for source, of_source in enumerate(rows):
        for expert, count in enumerate(of_source):
            where = source if expert in copied else expert // 2
            computed[where] += count
            if where != source:
                sent[source] += count
                received[where] += count
    return (
        3 * max(computed) * 100 / settings.flops_per_second
        + 4 * max(sent + received) * 8 / settings.bytes_per_second
        + 2 * len(copied) * 400 / settings.bytes_per_second
    )


@pytest.mark.parametrize("flops", [1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    "rows", [[[90, 2, 3, 1], [80, 0, 4, 5]], [[50, 2, 3, 40], [3, 9, 9, 1]], [[8] * 4] * 2]
)
def test_copies_are_chosen_where_the_model_says_that_they_pay(rows: list[list[int]], flops: float) -> None:
    settings = Shadowing(flops_per_second=flops, bytes_per_second=1e4)
    busiest = torch.tensor(rows).sum(0).argsort(descending=True, stable=True).tolist()
    choices = [set(busiest[:count]) for count in range(3)]
    best = min(choices, key=lambda copied: by_hand(rows, settings, copied))
    chosen = worth_copying(torch.tensor(rows, dtype=torch.float64), 8, 100, 400, settings)
    assert set(chosen) == best


def test_an_overloaded_expert_is_copied_where_links_are_fast() -> None:
    skewed = torch.tensor([[90.0, 2, 3, 1], [80, 0, 4, 5]], dtype=torch.float64)
    assert worth_copying(skewed, 8, 100, 400, SLOW_DEVICE) == [0]
    assert worth_copying(skewed, 8, 100, 40_000, SLOW_LINK) == []
    assert worth_copying(torch.full((2, 4), 8.0), 8, 100, 400, SLOW_DEVICE) == []


@pytest.mark.parametrize(
    ("case", "copied"),
    [
        (Case((20, 11), favourite=1), True),
        (Case((20, 11), favourite=6, dropped=3), True),
        (Case((0, 13), favourite=6), False),
        (Case((8, 3, 0, 9), favourite=1), True),
    ],
)
@pytest.mark.second_pair
def test_copies_compute_what_the_expert_does(case: Case, copied: bool) -> None:
    (reference,) = ranks(1).run(alone, case, True)
    for link, expected in ((SLOW_DEVICE, copied), (SLOW_LINK, False)):
        results = ranks(len(case.tokens)).run(run_copied, case, link)
        for result in results:
            assert (result["copied"] > 0) == expected
        for key in ("output", "tokens", "weights"):
            found = torch.cat([result[key] for result in results])
            assert (found - reference[key]).norm() <= 1e-6 * reference[key].norm()
        for name, gradient in reference["parameters"].items():
            found = torch.cat([result["parameters"][name] for result in results])
            assert (found - gradient).norm() <= 1e-6 * gradient.norm()
