"""The all-to-all dispatcher, in one part and in several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alltoall_on_ranks import Case, alone, run
from distributed import ranks
from torch import Tensor

from megatron_moe.model.moe.dispatch.parts import split

CASES = {
    "even": Case((12, 12)),
    "uneven, drops": Case((20, 7), dropped=3),
    "everything to one rank's expert": Case((9, 9), favourite=1),
    "a rank without tokens": Case((0, 11)),
    "no tokens at all": Case((0, 0)),
    "ETP2": Case((10, 14), etp=2, dropped=5),
    "four ranks": Case((8, 3, 0, 9)),
    "four ranks, EP2 ETP2": Case((8, 3, 0, 9), etp=2),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(name: str) -> None:
    case = CASES[name]
    ((reference,),) = [ranks(1).run(alone, case)]
    results = [degree_1 for (degree_1,) in ranks(len(case.tokens)).run(run, case, [1])]
    for key in ("output", "tokens", "weights"):
        _close(torch.cat([result[key] for result in results]), reference[key])
    for parameter, expected in reference["parameters"].items():
        _close(
            _joined(parameter, [result["parameters"][parameter] for result in results], case.etp), expected
        )


@pytest.mark.parametrize("name", [name for name in CASES if "ETP" not in name or "four" in name])
def test_parts_of_whole_experts_give_the_same_bits(name: str) -> None:
    case = CASES[name]
    local = case.experts // (len(case.tokens) // case.etp)
    for whole, *others in ranks(len(case.tokens)).run(run, case, [1, 2, local], True):
        for parts in others:
            _equal(parts, whole)


def test_more_parts_than_experts_cut_the_rows_of_experts() -> None:
    case = Case((15, 10), experts=2)
    for whole, two, five in ranks(2).run(run, case, [1, 2, 5]):
        for parts in (two, five):
            _equal({**parts, "parameters": {}}, {**whole, "parameters": {}})
            for parameter, expected in whole["parameters"].items():
                _close(parts["parameters"][parameter], expected)


def test_parts_hold_every_row_once() -> None:
    counts = torch.tensor([[5, 0, 3], [1, 7, 2]])
    for degree in range(1, 9):
        parts = split(3, degree)
        assert len(parts) == degree
        total = torch.zeros_like(counts)
        for part in parts:
            total[:, part.first : part.stop] += part.of(counts)
        assert torch.equal(total, counts)


def _joined(name: str, pieces: list[Tensor], etp: int) -> Tensor:
    """The gradient of all experts from the ranks' parts; ETP ranks come one after the other."""
    experts = []
    for first in range(0, len(pieces), etp):
        parts = pieces[first : first + etp]
        if "fc2" in name:
            experts.append(torch.cat(parts, dim=-1))
        else:
            halves = [part.chunk(2, dim=1) for part in parts]
            experts.append(torch.cat([half[index] for index in (0, 1) for half in halves], dim=1))
    return torch.cat(experts)


def _close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


def _equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("output", "tokens", "weights"):
        assert torch.equal(actual[key], expected[key]), key
    for name, gradient in expected["parameters"].items():
        assert torch.equal(actual["parameters"][name], gradient), name
