"""The section `moe`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.schema.section import (
    ExpertCount,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
)


class MoE(Section):
    """The mixture of experts. Leave the section out for a dense model."""

    num_moe_experts: ExpertCount
    """Routed experts e in each MoE layer."""
    moe_router_topk: PositiveInt = 2
    """Experts k that each token goes to."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Inner width of one expert. Default: model.ffn_hidden_size."""
    moe_layer_freq: PositiveInt | list[Annotated[int, Field(ge=0, le=1)]] = 1
    """n: every n-th layer is MoE, the first one included. A list of 0 and 1: one entry a layer, 1 is MoE."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Inner width of the shared experts together, which every token passes. Default: none."""
    moe_router_load_balancing_type: Literal["aux_loss", "none"] = "aux_loss"
    """The balancing loss. `aux_loss` is the Switch form e * sum_j f_j P_j over one microbatch (1 at perfect
    balance); by definition it is a function of the microbatch."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.01
    """Weight of the balancing loss."""
    moe_z_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the router z-loss mean(logsumexp(logits)^2) (ST-MoE)."""
    moe_router_pre_softmax: bool = False
    """True: softmax over all experts, then top-k. False: top-k of the logits, then softmax over the k
    (Mixtral)."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of the router's product and softmax."""
    moe_expert_capacity_factor: PositiveFloat | None = None
    """Each expert takes at most ceil(t * k / e * factor) of a microbatch's t tokens, the rest is dropped.
    Default: dropless."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an overfull expert drops: those with the smallest probability, or the last ones."""
    moe_would_drop_capacity_factor: PositiveFloat = 1.0
    """Dropless runs report the drop rate that this capacity factor would have caused
    (`moe/would_drop_rate`)."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens travel to the ranks of their experts. `flex` needs the library of
    moe_flex_dispatcher_backend and a GPU."""
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = "deepep"
    """Whose kernels the dispatcher `flex` runs."""
    moe_permute_fusion: bool = False
    """Sort tokens by expert in one kernel. Needs Transformer Engine and a GPU."""
    moe_router_fusion: bool = False
    """Choose experts in one kernel. Needs Transformer Engine and a GPU."""
