"""Which weights are trained: names as in the model itself, messages for patterns, memory and adapters."""

from __future__ import annotations

from typing import Any

import pytest
import trained_on_ranks as on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout

from megatron_moe.config.errors import InputError
from megatron_moe.plan.costs import memory, trained
from megatron_moe.plan.costs.parameters import count_parameters
from megatron_moe.plan.layout import Layout

LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
}
TARGETS = ["attention", "mlp", "shared_experts", "experts"]
BOTH = {**MOE, "moe_layer_freq": [0, 1, 0, 1], "moe_shared_expert_intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "GQA, shared experts, further tokens": {
        "moe": {**BOTH, "moe_shared_expert_gate": True, "moe_router_gate": "noisy_topk"},
        "model": {"mtp_num_layers": 1},
    },
    "LayerNorm, biases, learned positions, tied": {
        "moe": {**MOE, "moe_layer_freq": [0, 1, 0, 1]},
        "model": {
            "normalization": "LayerNorm",
            "qkv_bias": True,
            "position_embedding_type": "learned_absolute",
            "untie_embeddings_and_output_weights": False,
        },
    },
    "latent attention, adapters": {
        "moe": BOTH,
        "model": {"num_query_groups": 4, "multi_latent_attention": LATENT},
        "training": {"lora": {"rank": 2, "targets": TARGETS}},
    },
    "adapters, PP2": {
        "moe": BOTH,
        "parallel": layout(pp=2),
        "training": {"lora": {"rank": 2, "targets": TARGETS}},
    },
}


@pytest.mark.second_pair
@pytest.mark.parametrize("name", MODELS)
def test_names_and_sizes_are_those_of_the_model_that_is_built(name: str) -> None:
    made = experiment(**MODELS[name])
    size = Layout.of(made).world_size
    built = ranks(size).run(on_ranks.names_and_sizes, made)
    names = {name for of_rank, _ in built for name in of_rank}
    assert names == set(trained.Trained.of(made).names(made))
    if made.training.lora is not None:
        # The planner counts the vocabulary as given.
        padding = sum(held for _, held in built) - count_parameters(made).total
        assert padding == 2 * 32 * (256 - 250)


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        (["rooter"], "'rooter' means no weight of this model"),
        (["output"], "'output' means no weight of this model"),
        (["decoder.layers.3.mlp.experts.7.*"], "are frozen together, without a number"),
        (["*"], "leaves no weight to train"),
        (["*.linear_qkv.weight"], "without decoder.layers.0.self_attention.linear_qkv.bias"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(freeze: list[str], words: str) -> None:
    model = {"untie_embeddings_and_output_weights": False, "qkv_bias": True}
    with pytest.raises(InputError) as caught:
        trained.check(experiment(model=model, training={"freeze": freeze}))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "freeze", [["router", "norms"], ["decoder.layers.[0-2].*"], ["*.linear_fc1.*", "embeddings"]]
)
def test_patterns_that_mean_something_are_taken(freeze: list[str]) -> None:
    trained.check(experiment(training={"freeze": freeze}))


def test_only_trained_weights_have_gradients_and_states() -> None:
    whole, frozen = experiment(), experiment(training={"freeze": ["experts"]})
    at = Layout.of(whole)
    all_of_it, rest = (memory.static_bytes(one, at, "moe") for one in (whole, frozen))
    experts = 4 * (2 * 48 * 32 + 32 * 48)
    assert all_of_it.weights == rest.weights
    assert all_of_it.gradients - rest.gradients == 4 * experts
    assert all_of_it.optimizer - rest.optimizer == 8 * experts


def test_adapters_alone_have_gradients_and_states() -> None:
    lora = experiment(training={"lora": {"rank": 4, "targets": ["experts"]}})
    found = memory.static_bytes(lora, Layout.of(lora), "moe")
    adapters = 4 * (4 * 32 + 2 * 48 * 4 + 4 * 48 + 32 * 4)
    assert found.gradients == 4 * adapters
    assert found.optimizer == 8 * adapters
