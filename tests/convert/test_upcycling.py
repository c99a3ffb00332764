"""A mixture made of a dense model computes what that computes."""

from __future__ import annotations

import parity_on_ranks
import pytest
import torch
from distributed import ranks
from tiny_families import LENGTH, tiny
from torch import Tensor
from weights_in_memory import InMemory

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.upcycling import Upcycled
from megatron_moe.convert.upcycling_experiment import with_experts
from megatron_moe.convert.upcycling_rules import Changes, advice

TOKENS = torch.arange(2 * LENGTH).reshape(2, LENGTH) * 37 % 200
COPIES = Changes(router_std=0.02)


def _logits(experiment: Experiment, weights: dict[str, Tensor]) -> Tensor:
    ((logits, _),) = ranks(1).run(parity_on_ranks.outputs, experiment, weights, TOKENS)
    return logits


def _upcycled(family: str, changes: Changes, *overrides: str) -> tuple[Tensor, Tensor, Upcycled]:
    """Logits of the dense model and of the mixture made of it, and its weights."""
    model = tiny(family)
    before = model.experiment()
    after = with_experts(before, overrides)
    mixture = Upcycled(InMemory(model.ours()), before, after, changes)
    weights = {name: mixture.read(name) for name in mixture.inventory()}
    assert {name: (tuple(x.shape), x.dtype) for name, x in weights.items()} == {
        name: (weight.shape, weight.dtype) for name, weight in mixture.inventory().items()
    }
    return _logits(before, model.ours()), _logits(after, weights), mixture


@pytest.mark.second_pair
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", ["moe.num_moe_experts=4", "moe.moe_router_topk=2"]),
        ("llama", ["moe.num_moe_experts=8", "moe.moe_router_topk=4", "moe.moe_ffn_hidden_size=half"]),
        ("qwen2", ["moe.num_moe_experts=4", "moe.moe_router_topk=4", "moe.moe_ffn_hidden_size=quarter"]),
        ("qwen3", ["moe.num_moe_experts=4", "moe.moe_router_topk=1", "moe.moe_router_pre_softmax=true"]),
        ("llama", ["moe.num_moe_experts=3", "moe.moe_layer_freq=2"]),
        (
            "llama",
            [
                "moe.num_moe_experts=4",
                "moe.moe_router_score_function=sigmoid",
                "moe.moe_router_topk_scaling_factor=2.5",
                "moe.moe_router_enable_expert_bias=true",
            ],
        ),
        ("mistral", ["moe.num_moe_experts=4", "moe.moe_router_logit_normalization=1.0"]),
    ],
    ids=["copies", "halves", "quarters", "even-router", "some-layers", "sigmoid", "normalised"],
)
def test_the_first_logits_are_the_dense_models(family: str, overrides: list[str]) -> None:
    width = tiny(family).experiment().model.ffn_hidden_size
    assert width is not None
    parts = {"half": width // 2, "quarter": width // 4}
    for word, size in parts.items():
        overrides = [override.replace(f"={word}", f"={size}") for override in overrides]
    even = "moe.moe_router_pre_softmax=true" in overrides
    dense, mixture, _ = _upcycled(family, Changes(router_std=0.0) if even else COPIES, *overrides)
    torch.testing.assert_close(mixture, dense, rtol=0, atol=2e-5)


def test_experts_differ_by_their_noise_and_by_what_is_drawn_anew() -> None:
    overrides = ["moe.num_moe_experts=4"]
    for changes, changed in (
        (Changes(router_std=0.02, noise=0.1), 1.0),
        (Changes(router_std=0.02, reinitialized=0.5), 0.5),
    ):
        dense, logits, mixture = _upcycled("llama", changes, *overrides)
        assert not torch.allclose(logits, dense, atol=1e-3)
        name = "decoder.layers.0.mlp.experts.{}.linear_fc1.weight"
        first, second = (mixture.read(name.format(expert)) for expert in (0, 1))
        copy = mixture._dense.read("decoder.layers.0.mlp.linear_fc1.weight")
        rows = (first != copy).any(dim=1)
        assert rows.float().mean().item() == pytest.approx(changed, abs=0.02)
        # The gate's and the up-projection's rows of the same neurons, and of others in each expert.
        gate, up = rows.chunk(2)
        assert torch.equal(gate, up)
        assert not torch.equal(first, second)
        assert first.std().item() == pytest.approx(copy.std().item(), rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["moe.num_moe_experts=4", "moe.moe_ffn_hidden_size=7"], "does not divide"),
        (["moe.num_moe_experts=3", "moe.moe_ffn_hidden_size=half"], "no multiple of the granularity 2"),
        (["moe.num_moe_experts=4", "moe.moe_router_pre_softmax=true"], "moe.moe_router_pre_softmax"),
        (["moe.num_moe_experts=4", "moe.moe_shared_expert_intermediate_size=16"], "shared expert"),
        (["moe.num_moe_experts=4", "model.rotary_base=5.0"], "model.rotary_base: 5.0"),
        (["moe.num_moe_experts=4", "moe.moe_router_gate=noisy_topk"], "moe.moe_router_gate: noisy_topk"),
    ],
)
def test_what_could_not_start_as_the_dense_model_is_refused(overrides: list[str], problem: str) -> None:
    model = tiny("llama")
    before = model.experiment()
    assert before.model.ffn_hidden_size is not None
    half = str(before.model.ffn_hidden_size // 2)
    after = with_experts(before, [override.replace("half", half) for override in overrides])
    with pytest.raises(InputError, match=problem):
        Upcycled(InMemory(model.ours()), before, after, COPIES)


@pytest.mark.parametrize(
    ("moe", "words"), [(2.0, "Train from scratch"), (0.1, "Upcycle"), (1.0, "Either may be better")]
)
def test_advice_follows_the_published_rule(moe: float, words: str) -> None:
    assert advice(dense_flops=1e20, moe_flops=moe * 1e20).startswith(words)
