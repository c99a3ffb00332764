"""Blocks of many ranks against one process's tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_moe.engine.pieces import Piece
from megatron_moe.training.verify_differences import FLOOR, changes, rounding, whole, worst

LARGE, SMALL = torch.arange(12.0).reshape(4, 3), torch.tensor([[1e-7, 0.0]])
REFERENCE = {"large": LARGE, "small": SMALL}


def piece(name: str, rows: slice, data: Tensor | None = None) -> Piece:
    """Some rows of a tensor of `REFERENCE`."""
    full = REFERENCE[name]
    return Piece(name, tuple(full.shape), (rows.start, 0), full[rows] if data is None else data, False)


HALVES = [
    (0, piece("large", slice(0, 2))),
    (1, piece("large", slice(2, 4))),
    (0, piece("small", slice(0, 1))),
]


def test_equal_blocks_do_not_differ() -> None:
    assert worst(HALVES, REFERENCE).difference == 0


def test_whole_puts_blocks_together() -> None:
    assert torch.equal(whole(block for _, block in HALVES)["large"], LARGE)


def test_every_copy_counts_and_the_rank_of_the_worst_is_named() -> None:
    found = worst([*HALVES, (3, piece("large", slice(2, 4), LARGE[2:4] + 1))], REFERENCE)
    assert found.name == "large"
    assert found.rank == 3
    assert found.difference == pytest.approx(math.sqrt(6) / float(LARGE.norm()))


def test_a_tensor_with_almost_no_norm_is_held_against_the_floor() -> None:
    found = worst([*HALVES[:2], (0, piece("small", slice(0, 1), 2 * SMALL))], REFERENCE)
    assert found.name == "small"
    assert found.difference == pytest.approx(1e-7 / (FLOOR * float(LARGE.norm())), rel=1e-4)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_a_number_is_infinitely_far(number: float) -> None:
    broken = piece("large", slice(0, 2), torch.full((2, 3), number))
    found = worst([(0, broken), *HALVES[1:]], REFERENCE)
    assert (found.name, found.difference, found.rank) == ("large", math.inf, 0)


def test_a_block_that_no_rank_holds_is_found() -> None:
    found = worst(HALVES[1:], REFERENCE)
    assert (found.name, found.difference) == ("large", math.inf)
    assert found.remark


@pytest.mark.parametrize("shape", [(5, 3), (4, 3)])
def test_a_tensor_that_one_process_has_not_is_found(shape: tuple[int, int]) -> None:
    name = "large" if shape == (5, 3) else "further"
    found = worst([*HALVES, (1, Piece(name, shape, (0, 0), LARGE[:2], False))], REFERENCE)
    assert (found.name, found.rank, found.difference) == (name, 1, math.inf)
    assert found.remark


def test_changes_skips_what_was_only_there_before() -> None:
    before = [(0, piece("small", slice(0, 1))), *HALVES]
    after = [(0, piece("large", slice(0, 2), LARGE[0:2] + 1)), *HALVES[1:]]
    found = {(rank, block.name): float(block.data.sum()) for rank, block in changes(before, after)}
    assert found == {(0, "large"): 6.0, (1, "large"): 0.0, (0, "small"): 0.0}


def test_where_gradients_are_rounding_updates_are_chance() -> None:
    """A gradient of exactly zero is none: what moves there, moves by decay."""
    gradients = {"large": torch.ones(4, 3), "small": torch.zeros(1, 2)}
    gradients["large"][2] = torch.tensor([1e-7, 0.0, -1e-7]).abs()
    chance = rounding(gradients, 1e-5)
    assert chance["large"].nonzero().tolist() == [[2, 0], [2, 2]]
    assert not chance["small"].any()
    moved = LARGE[2:4].clone()
    moved[0, 0] += 1
    found = [HALVES[0], (1, piece("large", slice(2, 4), moved)), HALVES[2]]
    assert worst(found, REFERENCE, chance).difference == 0
    moved[0, 1] += 1
    found = [HALVES[0], (1, piece("large", slice(2, 4), moved)), HALVES[2]]
    assert worst(found, REFERENCE, chance).difference == pytest.approx(1 / float(LARGE.norm()))
