"""Heads that tensor-parallel ranks cannot share evenly are dealt out, and compute what one process does."""

from __future__ import annotations

from typing import Any

import generation_on_ranks
import pytest
from distributed import ranks
from experiments import MOE, experiment

from megatron_moe.inference.sampling import Sampling
from megatron_moe.inference.settings import Settings
from megatron_moe.plan.inference import heads_of_ranks

PROMPTS = [[5, 9, 17, 33], [7], list(range(40, 55))]
GREEDY = Settings(max_new_tokens=10)
SAMPLED = Settings(max_new_tokens=10, sampling=Sampling(temperature=1.0, seed=1))


def heads(count: int, groups: int, **model: Any) -> dict[str, Any]:
    return {"num_attention_heads": count, "num_query_groups": groups, "kv_channels": 4, **model}


def test_thirty_six_over_eight() -> None:
    assert heads_of_ranks(36, 36, 8) == [(5, 5)] * 4 + [(4, 4)] * 4


@pytest.mark.parametrize(
    ("count", "groups", "size", "expected"),
    [
        (10, 10, 4, [(3, 3), (3, 3), (2, 2), (2, 2)]),
        (9, 3, 2, [(6, 2), (3, 1)]),
        (10, 5, 4, [(4, 2), (2, 1), (2, 1), (2, 1)]),
    ],
)
@pytest.mark.second_pair
def test_heads_weights_and_cache_of_each_rank(
    count: int, groups: int, size: int, expected: list[tuple[int, int]]
) -> None:
    """And their tokens are those of one process."""
    dense = experiment(None, model=heads(count, groups))
    (weights,) = ranks(1).run(generation_on_ranks.drawn, dense)
    layout = [f"parallel.tensor_model_parallel_size={size}"]
    found = ranks(size).run(generation_on_ranks.heads_of_this_rank, dense, weights, layout)
    assert found == [(n, (n + 2 * g) * 4, n * 4, g) for n, g in expected]
    given = dense, weights
    (one,) = ranks(1).run(generation_on_ranks.generated, *given, [], PROMPTS, [GREEDY, SAMPLED])
    several = ranks(size).run(generation_on_ranks.generated, *given, layout, PROMPTS, [GREEDY, SAMPLED])
    assert several == [one] * size


LATENT = {"kv_lora_rank": 10, "q_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
MODELS: dict[str, dict[str, Any]] = {
    "norms, biases": heads(9, 3, qk_norm="head", qkv_bias=True, attention_output_bias=True),
    "norm of all heads": heads(9, 3, qk_norm="all_heads", clip_qkv=2.0),
    "sinks, window": heads(9, 3, attention_sinks=True, sliding_window=4),
    "latent": {
        "num_attention_heads": 5,
        "num_query_groups": None,
        "kv_channels": None,
        "hidden_size": 40,
        "multi_latent_attention": LATENT,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_whatever_attention_has_around_it(name: str) -> None:
    model = experiment(MOE, model=MODELS[name])
    (weights,) = ranks(1).run(generation_on_ranks.drawn, model)
    (one,) = ranks(1).run(generation_on_ranks.generated, model, weights, [], PROMPTS, [GREEDY])
    layout = ["parallel.tensor_model_parallel_size=2"]
    several = ranks(2).run(generation_on_ranks.generated, model, weights, layout, PROMPTS, [GREEDY])
    assert several == [one, one]
