"""Models of every family compute what transformers computes, forward and backward, on real text."""

from __future__ import annotations

from pathlib import Path

import parity_on_ranks
import pytest
import torch
from distributed import ranks
from tiny_families import CASES, LENGTH, tiny

TEXT = Path(__file__).parents[2] / "README.md"


@pytest.mark.second_pair
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    model = tiny(name)
    experiment = model.experiment()
    tokens = torch.tensor(list(TEXT.read_bytes()[: 2 * LENGTH])).reshape(2, LENGTH)
    groups, weights = list(model.family.groups(experiment)), {}
    for group in groups:
        values = group.to_ours([model.weights[it] for it in group.theirs])
        weights |= dict(zip(group.ours, values, strict=True))
    ((logits, gradients),) = ranks(1).run(parity_on_ranks.outputs, experiment, weights, tokens)
    exact, of_theirs = model.gradients(tokens)
    torch.testing.assert_close(logits, exact, rtol=0, atol=1e-4)
    for group in groups:
        if group.ours[0].startswith("mtp.") or group.ours[0].endswith(".expert_bias"):
            continue  # what transformers does not have, and what has no gradient
        exact_ones = group.to_ours([of_theirs.get(it, of_theirs[group.theirs[0]]) for it in group.theirs])
        for weight, exact in zip(group.ours, exact_ones, strict=True):
            assert (gradients[weight] - exact).norm() <= 1e-4 * exact.norm() + 1e-7, weight
