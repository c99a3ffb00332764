"""The section `moe`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.schema.section import (
    ExpertCount,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PartCount,
    PositiveFloat,
    PositiveInt,
    Section,
    Width,
)


class AdaptiveCoefficient(Section):
    """A coefficient that follows the drop rate d of its layer (Skywork-MoE, eqs. 7 to 9): each iteration
    alpha <- beta * alpha + (1 - beta) * min(xi * d, maximum). Every layer has its own, saved with the
    checkpoint. d counts the whole global batch; of a dropless run it is the rate that
    moe_would_drop_capacity_factor would have dropped."""

    initial: NonNegativeFloat = 0.01
    """alpha before the first iteration."""
    xi: PositiveFloat = 0.2
    """Slope of the target over the drop rate."""
    maximum: PositiveFloat = 0.01
    """Largest target."""
    beta: Fraction = 0.99
    """Share of the previous value that each iteration keeps."""


class ScheduledCoefficient(Section):
    """A coefficient that goes from `start` to `end` within `iterations`, and stays there."""

    start: NonNegativeFloat
    """Before the first iteration."""
    end: NonNegativeFloat
    """After `iterations`."""
    iterations: PositiveInt
    """Iterations from start to end."""
    style: Literal["linear", "cosine"] = "linear"
    """Shape of the way there."""


Coefficient = NonNegativeFloat | AdaptiveCoefficient | ScheduledCoefficient
"""A number, or `{xi: .., ..}` for an adaptive one, or `{start: .., end: .., iterations: ..}`."""

BalanceLoss = Literal[
    "aux_loss",
    "seq_aux_loss",
    "global_aux_loss",
    "skywork_aux_loss",
    "gshard_aux_loss",
    "importance_loss",
    "load_loss",
    "device_aux_loss",
    "communication_aux_loss",
    "none",
]


class Shadowing(Section):
    """FasterMoE's shadowing: an overloaded expert is copied to all ranks of its group for one microbatch when
    the model says that this takes less time than its imbalance."""

    flops_per_second: PositiveFloat
    """What a rank's device computes in a matrix product."""
    bytes_per_second: PositiveFloat
    """What a link between two ranks of the expert-parallel group carries."""
    maximum: PositiveInt = 2
    """Experts of a layer that may be copied at once."""


class MoE(Section):
    """The mixture of experts. Leave the section out for a dense model."""

    num_moe_experts: ExpertCount
    """Routed experts e in each MoE layer."""
    moe_router_topk: PositiveInt = 2
    """Experts k that each token goes to."""
    moe_ffn_hidden_size: Width | None = None
    """Inner width of one expert. Default: model.ffn_hidden_size."""
    moe_layer_freq: PositiveInt | list[Annotated[int, Field(ge=0, le=1)]] = 1
    """n: every n-th layer is MoE, the first one included. A list of 0 and 1: one entry a layer, 1 is MoE."""
    moe_first_k_dense_layers: NonNegativeInt = 0
    """The first k layers are dense, whatever moe_layer_freq says of them (DeepSeek-V3: 3). Not beside a
    list."""
    moe_expert_activation: (
        Literal["swiglu", "geglu", "clamped_swiglu", "gelu", "relu", "squared_relu"] | None
    ) = None
    """Activation inside the routed experts. Default: model.activation."""
    moe_expert_dropout: Fraction = 0.0
    """Dropout inside the experts, behind the activation (Switch Transformer: 0.4 when finetuning)."""
    moe_expert_init_scale: PositiveFloat = 1.0
    """The initial standard deviation of the routed experts' weights, times that of other layers."""
    moe_shared_expert_intermediate_size: Width | None = None
    """Inner width of the shared experts together, which every token passes. Default: none."""
    moe_shared_expert_gate: bool = False
    """Weigh the shared experts' output by a sigmoid gate of its own (Qwen2-MoE)."""

    moe_router_gate: Literal[
        "topk", "noisy_topk", "switch", "gshard", "sinkhorn", "swipe", "hash", "forced_balance"
    ] = "topk"
    """How experts are chosen. `topk`: the k largest scores. `noisy_topk`: the k largest of logits with learnt
    noise (Sparsely-Gated). `switch`: the largest, of jittered input (Switch Transformer, top-1). `gshard`:
    the largest, and a random second, first choices seated first (top-2). `sinkhorn`: balanced by Sinkhorn's
    iteration. `swipe`: each of moe_num_device_groups shares of the experts takes a bounded number of tokens,
    overflow goes to those with room. `hash`: by the token's number in the vocabulary, no parameters.
    `forced_balance`: random, even for every expert, for benchmarks only."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of logits."""
    moe_router_pre_softmax: bool = False
    """True: softmax over all experts, then top-k. False: top-k of the logits, then softmax over the k
    (Mixtral)."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of the router's product and softmax, whatever training.precision is."""
    moe_router_topk_scaling_factor: PositiveFloat | None = None
    """Factor on all gate weights (DeepSeek). Default: 1."""
    moe_router_norm_topk: bool = True
    """With sigmoid scores: divide the weights of the chosen experts by their sum, where k > 1
    (norm_topk_prob of DeepSeek-V3). With a softmax moe_router_pre_softmax says so: false is the same as
    dividing."""
    moe_router_bias: bool = False
    """The router's logits have a learnt bias (gpt-oss)."""
    moe_router_logit_normalization: PositiveFloat | None = None
    """lambda of Skywork-MoE's gating-logit normalization lambda * (z - mean(z)) / (std(z) + epsilon), over
    the experts; the z-loss takes the logits before it. Default: none."""
    moe_router_logit_normalization_epsilon: PositiveFloat = 1e-6
    """Added to the standard deviation, so that equal logits stay equal."""
    moe_router_num_groups: PositiveInt | None = None
    """Groups that experts lie in, for group-limited routing (DeepSeek). Default: none."""
    moe_router_group_topk: PositiveInt | None = None
    """Groups that a token's experts may come from."""
    moe_router_group_score_topk: PositiveInt | None = None
    """A group's score is the sum of so many of its largest ones. Default: 1 with a softmax (DeepSeek-V2),
    with sigmoid scores moe_router_topk / moe_router_group_topk (DeepSeek-V3: 2)."""
    moe_router_enable_expert_bias: bool = False
    """Balance without a loss (DeepSeek-V3): choose by score + bias, and after each iteration move each
    expert's bias against its load. Needs sigmoid scores."""
    moe_router_bias_update_rate: PositiveFloat = 1e-3
    """How far a bias moves in an iteration."""
    moe_input_jitter_eps: Fraction | None = None
    """The router's input is multiplied by numbers from 1 - eps to 1 + eps in training. Default: 0.01 with the
    gate `switch`, else none."""
    moe_router_init_scale: PositiveFloat = 1.0
    """The initial standard deviation of the router's weights, times that of other layers."""

    moe_router_load_balancing_type: BalanceLoss | list[BalanceLoss] = "aux_loss"
    """The balancing loss, or several. `aux_loss` is the Switch form e * sum_j f_j P_j over one microbatch (1
    at perfect balance); by definition it is a function of the microbatch. `seq_aux_loss`: the same over each
    sequence (DeepSeek-V3). `global_aux_loss`: f of the previous global batch. `skywork_aux_loss`:
    sum_j (1/e - P_j)^2. `gshard_aux_loss`: the mean over experts of f_j P_j, f from first choices only.
    `importance_loss`, `load_loss`: squared coefficients of variation (Sparsely-Gated). `device_aux_loss`,
    `communication_aux_loss`: DeepSeek-V2's, over moe_num_device_groups."""
    moe_aux_loss_coeff: Coefficient | list[Coefficient] = 0.01
    """Weight of the balancing loss. With several losses that of each of them, or a list in their order. A
    number, `{xi: 0.2, ..}` for one that follows the drop rate, or `{start: .., end: .., iterations: ..}`."""
    moe_z_loss_coeff: Coefficient = 0.0
    """Weight of the router z-loss mean(logsumexp(logits)^2) (ST-MoE)."""
    moe_num_device_groups: PositiveInt | None = None
    """Groups of experts that the device and communication losses balance, or the gate `swipe`; the ranks that
    hold them need not be as many. Default: moe_router_num_groups, with `swipe` one for each expert."""

    moe_expert_capacity_factor: Annotated[float, Field(allow_inf_nan=False)] | Literal["auto"] | None = None
    """Each expert takes at most ceil(t * k / e * factor) of a microbatch's t tokens, the rest is dropped.
    `auto` or 0: as many as the fullest expert needs, nothing is dropped. Below 0: as `auto`, but at most what
    the factor without its sign allows (Tutel). Default: dropless."""
    moe_eval_capacity_factor: Annotated[float, Field(allow_inf_nan=False)] | Literal["auto"] | None = None
    """The same in evaluation. Default: moe_expert_capacity_factor."""
    moe_token_drop_policy: Literal["probs", "position", "batch_priority"] = "probs"
    """Which assignments an overfull expert drops: `probs` those with the smallest gate weight, `position` the
    last ones, `batch_priority` those of the tokens with the smallest largest weight, first choices before
    second ones (V-MoE)."""
    moe_pad_expert_input_to_capacity: bool = False
    """Every expert computes as many rows as its capacity, so that shapes don't change from step to step."""
    moe_would_drop_capacity_factor: PositiveFloat = 1.0
    """Dropless runs report the drop rate that this capacity factor would have caused
    (`moe/would_drop_rate`)."""

    moe_token_dispatcher_type: Literal["auto", "alltoall", "allgather", "deduplicated", "flex"] = "alltoall"
    """How tokens travel to the ranks of their experts. `alltoall`: a copy for each chosen expert.
    `deduplicated`: one copy for each rank that holds any, which sums its experts before the way back.
    `allgather`: all tokens to all ranks. `auto`: what moves the fewest bytes. `flex` needs the library of
    moe_flex_dispatcher_backend and a GPU."""
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = "deepep"
    """Whose kernels the dispatcher `flex` runs."""
    moe_ranks_per_node: PositiveInt | None = None
    """Ranks of one node, for an all-to-all in two levels: inside nodes, then between them. For experts over
    several nodes: it divides EP x ETP. Default: one level."""
    moe_overlap_degree: PartCount = 1
    """Parts that the all-to-all is split in, between experts, so that one part travels while another is
    computed. More parts than a rank has experts also cut the rows of experts."""
    moe_shared_expert_overlap: bool = False
    """Compute the shared experts while tokens travel."""
    overlap_moe_expert_parallel_comm: bool = False
    """Megatron-Core's batch-level overlap: the forward pass of one microbatch hides the all-to-all of
    another's backward pass. Needs bf16."""
    moe_shadowing: Shadowing | None = None
    """Copy overloaded experts for a microbatch (FasterMoE). Leave the section out for none."""
    moe_permute_fusion: bool = False
    """Sort tokens by expert in one kernel, where the layer is Megatron-Core's own: with the dispatcher `flex`
    or overlap_moe_expert_parallel_comm. Needs Transformer Engine and a GPU."""
