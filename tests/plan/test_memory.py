"""Weights, gradients and optimizer of a rank against what Megatron-Core's buffers and our Adam hold."""

from __future__ import annotations

from typing import Any

import pytest
from activations_on_ranks import static
from distributed import ranks
from experiments import experiment, layout

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.memory import shared_embedding, static_bytes
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.plan import make
from megatron_moe.plan.stages import Stage
from megatron_moe.plan.units import StaticBytes

MODEL = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 320, "vocab_size": 1000}
MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 192, "moe_layer_freq": [0, 1, 1, 1]}


def sized(ranks: int, **sections: Any) -> tuple[Experiment, int]:
    return experiment(moe=MOE, model={**MODEL, **sections.pop("model", {})}, **sections), ranks


BF16 = {"precision": "bf16"}
CASES: dict[str, tuple[Experiment, int]] = {
    "fp32": sized(1),
    "bf16": sized(1, training=BF16),
    "EDP in bf16": sized(2, parallel=layout(tp=2), training=BF16),
    "experts on one replica each": sized(2, parallel=layout(dp=2, expert_model_parallel_size=2)),
    "bf16 gradients, two replicas": sized(
        2, parallel=layout(dp=2, expert_model_parallel_size=1, grad_reduce_in_fp32=False), training=BF16
    ),
    "context parallelism": sized(2, parallel=layout(cp=2, expert_model_parallel_size=2)),
    "tied embeddings on two stages": sized(
        2, parallel=layout(pp=2), model={"untie_embeddings_and_output_weights": False}
    ),
    "multi-token prediction on the last of two stages": sized(
        2,
        parallel=layout(pp=2),
        model={"mtp_num_layers": 1, "untie_embeddings_and_output_weights": False},
        pipeline={"layers_per_stage": [3, 1]},
    ),
    "latent attention": sized(
        2,
        parallel=layout(tp=2),
        model={
            "num_query_groups": None,
            "multi_latent_attention": {
                "q_lora_rank": 48,
                "kv_lora_rank": 32,
                "qk_head_dim": 32,
                "qk_pos_emb_head_dim": 16,
                "v_head_dim": 32,
            },
        },
    ),
}


def planned(given: Experiment, stage: Stage) -> StaticBytes:
    """What the pieces of a stage come to."""
    parts = Layout.of(given)
    pieces = [static_bytes(given, parts, "moe" if n in stage.moe_layers else "dense") for n in stage.layers]
    if stage.has_embedding:
        pieces.append(static_bytes(given, parts, "embedding"))
    if stage.num_mtp_layers:
        pieces.append(static_bytes(given, parts, "mtp"))
    if stage.has_loss:
        pieces.append(static_bytes(given, parts, "head"))
    if not stage.has_embedding:
        pieces += [shared_embedding(given, parts)] * stage.has_loss
        pieces += [static_bytes(given, parts, "embedding")] * (stage.num_mtp_layers > 0)
    return sum(pieces, StaticBytes(0, 0, 0))


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_what_the_planner_counts(case: str) -> None:
    """To 1 %: the ends of buffers are not counted."""
    given, count = CASES[case]
    plan = make(given)
    measured = ranks(count).run(static, given)
    ours = [planned(given, plan.stages_on(rank)[0]) for rank in range(count)]
    for rank, (weights, gradients, _) in enumerate(measured):
        of_rank = ours[rank].weights, ours[rank].gradients
        assert of_rank == pytest.approx((weights, gradients), rel=0.01), f"rank {rank}"
    # Tensors are cut between replicas wherever an equal share ends.
    whole = sum(optimizer for _, _, optimizer in measured)
    assert sum(rank.optimizer for rank in ours) == pytest.approx(whole, rel=0.01)


def test_states_in_other_precisions_take_their_bytes() -> None:
    given, _ = sized(1, training=BF16)
    parts = Layout.of(given)
    plain = static_bytes(given, parts, "dense")
    assert plain.optimizer == pytest.approx(6 * plain.weights)
    updates: list[tuple[dict[str, Any], float]] = [
        # Two moments of two bytes, and two of a master of four that a weight in bf16 lacks.
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 3),
        ({"use_precision_aware_optimizer": True, "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8"}, 2),
        ({"optimizer_cpu_offload": True}, 0),
        ({"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}, 3),
    ]
    for update, times in updates:
        optimizer = given.optimizer.model_copy(update=update)
        changed = static_bytes(given.model_copy(update={"optimizer": optimizer}), parts, "dense")
        assert changed.optimizer == pytest.approx(times * plain.weights), update
