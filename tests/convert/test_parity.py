"""Models of every family compute what transformers computes, forward and backward, on real text."""

from __future__ import annotations

from pathlib import Path

import parity_on_ranks
import pytest
import torch
from distributed import ranks
from tiny_families import CASES, LENGTH, tiny
from torch import Tensor

TEXT = Path(__file__).parents[2] / "README.md"


def _tokens() -> Tensor:
    """The bytes of two sequences of text."""
    return torch.tensor(list(TEXT.read_bytes()[: 2 * LENGTH])).reshape(2, LENGTH)


@pytest.mark.second_pair
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    model = tiny(name)
    experiment = model.experiment()
    tokens = _tokens()
    groups, weights = list(model.family.groups(experiment)), model.ours()
    ((logits, gradients),) = ranks(1).run(parity_on_ranks.outputs, experiment, weights, tokens)
    exact, of_theirs = model.gradients(tokens)
    torch.testing.assert_close(logits, exact, rtol=0, atol=1e-4)
    for group in groups:
        if group.ours[0].startswith("mtp.") or group.ours[0].endswith(".expert_bias"):
            continue  # what transformers does not have, and what has no gradient
        exact_ones = group.to_ours([of_theirs.get(it, of_theirs[group.theirs[0]]) for it in group.theirs])
        for weight, exact in zip(group.ours, exact_ones, strict=True):
            assert (gradients[weight] - exact).norm() <= 1e-4 * exact.norm() + 1e-7, weight


@pytest.mark.second_pair
def test_further_token_is_predicted_as_transformers_drafts_it() -> None:
    """Of DeepSeek-V3's multi-token-prediction layer transformers knows the computation, to draft tokens."""
    from transformers.modeling_layers import MtpModel

    model = tiny("deepseek_v3")
    tokens = _tokens()
    drafting = MtpModel(model.model, 1).float()
    layer, names = drafting.layers[0], f"model.layers.{model.model.config.num_hidden_layers}."
    layer.mtp_block.load_state_dict(
        {k: 0.5 * v for k, v in model.model.model.layers[-1].state_dict().items()}
    )
    for part, name in ((layer.enorm, "enorm"), (layer.hnorm, "hnorm"), (layer.eh_proj, "eh_proj")):
        part.weight.data = model.weights[f"{names}{name}.weight"]
    layer.post_norm.weight.data = model.weights[f"{names}shared_head.norm.weight"]
    with torch.no_grad():
        hidden = model.model.model(tokens[:, :-2], use_cache=False).last_hidden_state
        positions = torch.arange(1, LENGTH - 1)[None]
        hidden = drafting.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:-1])
        logits = model.model.lm_head(hidden)
    exact = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 2:], reduction="none")
    (losses,) = ranks(1).run(parity_on_ranks.further_losses, model.experiment(), model.ours(), tokens)
    torch.testing.assert_close(losses, exact, rtol=0, atol=1e-4)
