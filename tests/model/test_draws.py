"""Random numbers by position: even, independent, and nobody else's business."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_moe.model.moe.draws import Draws, key, normal, uniform
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.marks import mark
from megatron_moe.model.moe.microbatch import Microbatch

ROWS = torch.arange(40_000)
KEY = key(1234, 3, "noise")


def test_uniform_numbers_are_even() -> None:
    """Pearson's chi-square of 64 bins, and of all pairs of neighbours in 16 x 16: within 5 standard
    deviations of its mean."""
    drawn = uniform(KEY, ROWS, 4)
    assert 0 < float(drawn.min()) < 1e-4 and 1 - 1e-4 < float(drawn.max()) < 1
    across = np.stack([drawn[:, :3].flatten(), drawn[:, 1:].flatten()], 1)
    along = np.stack([drawn[:-1].flatten(), drawn[1:].flatten()], 1)
    counts = [np.histogram(drawn, 64, (0, 1))[0]]
    counts += [np.histogramdd(pairs, (16, 16), ((0, 1), (0, 1)))[0] for pairs in (across, along)]
    for count in counts:
        expected, freedom = count.sum() / count.size, count.size - 1
        chi_square = ((count - expected) ** 2 / expected).sum()
        assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_normal_numbers_have_the_moments() -> None:
    drawn = normal(KEY, ROWS, 5).double()
    count = drawn.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float(drawn.pow(power).mean()) - moment) < 5 * math.sqrt(variance / count)
    correlation = torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max()
    assert float(correlation) < 5 / math.sqrt(len(ROWS))


@pytest.mark.parametrize("other", [(1235, 3, "noise"), (1234, 4, "noise"), (1234, 3, "jitter")])
def test_seed_layer_and_purpose_draw_for_themselves(other: tuple[int, int, str]) -> None:
    both = torch.stack([uniform(KEY, ROWS, 1).flatten(), uniform(key(*other), ROWS, 1).flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(len(ROWS))


def test_a_number_depends_on_its_position_only() -> None:
    """Not on which other tokens there are, or on how many numbers each draws."""
    some = torch.tensor([7, 3, 39_999])
    assert torch.equal(uniform(KEY, some, 3), uniform(KEY, ROWS, 6)[some, :3])
    assert torch.equal(uniform(KEY, some + 2**39, 3), uniform(KEY, some + 2**39, 3))
    assert not torch.isin(uniform(KEY, some + 2**39, 3), uniform(KEY, some, 3)).any()


def test_draws_of_a_layer_go_by_marks() -> None:
    """Padding and the place within the microbatch play no part."""
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    positions = torch.tensor([[40, 41, 42, 43], [90, 91, 92, 93]])
    padding = torch.tensor([[False, False, True, True], [False] * 4])
    drawn = []
    for marks in (mark(None, tokens, positions), mark(padding, tokens, positions).flip(0)):
        draws = Draws(Microbatch(4, 2, MoEGroups(), marks.T), seed=1, layer_number=2)
        drawn.append(draws.uniform("x", 3).view(4, 2, 3))
    assert torch.equal(drawn[0], drawn[1].flip(1))


def test_without_marks_the_random_state_of_torch_decides() -> None:
    """In a program of one's own: new numbers each time, the same where recompute restores the state."""

    def drawn() -> torch.Tensor:
        draws = Draws(Microbatch(4, 2, MoEGroups()), seed=1, layer_number=2)
        assert torch.equal(draws.uniform("x", 3), draws.uniform("x", 3))
        return draws.uniform("x", 3)

    torch.manual_seed(5)
    first, second = drawn(), drawn()
    torch.manual_seed(5)
    assert torch.equal(drawn(), first)
    assert not torch.equal(first, second)


def test_marks_hold_what_is_put_into_them() -> None:
    from megatron_moe.model.moe.marks import padding_of, positions_of, tokens_of

    tokens = torch.tensor([[0, 1, 2**22 - 1]])
    positions = torch.tensor([[0, 2**40 - 1, 2**40 + 5]])
    padding = torch.tensor([[True, False, True]])
    marks = mark(padding, tokens, positions)
    assert torch.equal(padding_of(marks), padding)
    assert torch.equal(tokens_of(marks), tokens)
    assert positions_of(marks).tolist() == [[0, 2**40 - 1, 5]], "a run that long draws again what it drew"
