"""What can be upcycled, how the weights of experts are scaled, and whether it is worth it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE

FROM_SCRATCH = 2.0
"""Training compute over the dense model's from which on a mixture is better trained from scratch
(Skywork-MoE, sec. 3)."""
MUCH_SMALLER = 0.5
"""Below this part of the dense model's compute the report's "much smaller" is taken to hold; it gives no
number."""


@dataclass(frozen=True)
class Changes:
    """What is not a copy.

    Attributes:
        router_std: standard deviation of the router's rows, one draw for each copy of the dense layer.
        noise: normal noise on every expert's matrices, as a part of each matrix' root mean square.
        reinitialized: part of each expert's inner neurons that are drawn anew, from a normal distribution
            with mean and deviation of what they replace (Nakamura et al. 2025, "Drop-Upcycling").
        seed: of all that is drawn.
    """

    router_std: float
    noise: float = 0.0
    reinitialized: float = 0.0
    seed: int = 1234


def granularity_of(before: Experiment, after: Experiment) -> int:
    """Slices that each dense feed-forward layer is cut into."""
    assert before.model.ffn_hidden_size is not None
    assert after.moe is not None and after.moe.moe_ffn_hidden_size is not None
    return before.model.ffn_hidden_size // after.moe.moe_ffn_hidden_size


def scale_of(after: Experiment, granularity: int) -> float:
    """What the second matrix of each expert is multiplied by, so that the gate weights add up to the dense
    layer.

    k / G copies of the dense layer are chosen, each as G slices. The k gate weights add up to 1, or where
    they are taken before the choice (with an even router) to k / e, times
    `moe.moe_router_topk_scaling_factor`.
    """
    moe = after.moe
    assert moe is not None
    total = moe.moe_router_topk_scaling_factor or 1.0
    if moe.moe_router_pre_softmax:
        total *= moe.moe_router_topk / moe.num_moe_experts
    return granularity / total


def obstacles(before: Experiment, after: Experiment, changes: Changes) -> list[str]:
    """Why the model of `after` could not start as that of `before`: a line each."""
    assert after.moe is not None
    problems = [*_obstacles_in_model(before, after)]
    if before.moe is None:
        problems += _obstacles_in_mixture(before, after.moe, changes)
    return problems


def _obstacles_in_model(before: Experiment, after: Experiment) -> Iterator[str]:
    if before.moe is not None and any(moe_layers(before)):
        yield (
            f"moe.num_moe_experts: the model has {before.moe.num_moe_experts} experts already; give a dense "
            "one, or make one of it first (checkpoint dense)"
        )
    for key in type(before.model).model_fields:
        old, new = getattr(before.model, key), getattr(after.model, key)
        if old != new and key != "max_position_embeddings":
            yield f"model.{key}: {new}, but {old} in the dense model; leave it as it is there"
    if not any(moe_layers(after)):
        yield "moe.moe_layer_freq: no layer would have experts; leave it out for experts in every layer"


def _obstacles_in_mixture(before: Experiment, moe: MoE, changes: Changes) -> Iterator[str]:
    width, inner = before.model.ffn_hidden_size, moe.moe_ffn_hidden_size
    assert width is not None and inner is not None
    if inner > width or width % inner:
        yield f"moe.moe_ffn_hidden_size: {inner}, which does not divide the dense layer's {width}"
        return
    granularity = width // inner
    for key, value in (("num_moe_experts", moe.num_moe_experts), ("moe_router_topk", moe.moe_router_topk)):
        if value % granularity:
            above = -(-value // granularity) * granularity
            yield (
                f"moe.{key}: {value} is no multiple of the granularity {granularity}: a token's experts must "
                f"be whole copies of the dense layer; {above} would do"
            )
    if moe.moe_router_gate != "topk":
        yield f"moe.moe_router_gate: {moe.moe_router_gate}; only topk starts as the dense model"
    if moe.moe_shared_expert_intermediate_size is not None:
        yield (
            f"moe.moe_shared_expert_intermediate_size: {moe.moe_shared_expert_intermediate_size}; a shared "
            "expert would add to what the dense layer computes; leave it out"
        )
    if moe.moe_expert_activation not in (None, before.model.activation):
        yield (
            f"moe.moe_expert_activation: {moe.moe_expert_activation}, but the dense layers have "
            f"{before.model.activation}; leave it out"
        )
    if moe.moe_router_pre_softmax and (changes.router_std or granularity > 1):
        yield (
            "moe.moe_router_pre_softmax: the weights of a token's experts would not add up to the same for "
            "every token; set it to false, or take --granularity 1 --router-std 0"
        )


def advice(dense_flops: float, moe_flops: float) -> str:
    """Upcycle or train from scratch, by the compute of both trainings (Skywork-MoE, sec. 3).

    Args:
        dense_flops: C_dense, what the dense model was trained with.
        moe_flops: C_MoE, what there is for the mixture of experts.
    """
    ratio = moe_flops / dense_flops
    if ratio >= FROM_SCRATCH:
        return (
            f"Train from scratch: C_MoE is {ratio:.2g} times C_dense, and from {FROM_SCRATCH:g} on that ends "
            "better."
        )
    if ratio <= MUCH_SMALLER:
        return f"Upcycle: C_MoE is {ratio:.2g} times C_dense, much smaller."
    return (
        f"Either may be better: C_MoE is {ratio:.2g} times C_dense. Upcycling wins where it is much smaller, "
        f"training from scratch from {FROM_SCRATCH:g} on; try both for some steps, and tune the learning "
        "rate when upcycling."
    )
