"""Dense feed-forwards and mixtures: Megatron-Core's MLP and SharedExpertMLP, `model/moe/`."""

from __future__ import annotations

from math import comb

from megatron_moe.config.capacity_factor import limit
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE
from megatron_moe.plan.costs.activations.share import Part, Share
from megatron_moe.plan.costs.weight import GATED
from megatron_moe.plan.journeys import Ranks, taken
from megatron_moe.plan.layout import Layout

_FP32, _INT64 = 4, 8

_DENSE_WIDTHS = {"swiglu": 5, "geglu": 5, "clamped_swiglu": 7, "gelu": 2, "relu": 1, "squared_relu": 2}
"""Times the inner width that an unfused activation keeps, its result included. A gated one: both halves of
its input, the gate's activation, the other half plus an offset of 0, and the product; relu only its
result."""

_EXPERT_WIDTHS = {"swiglu": 5, "geglu": 5, "clamped_swiglu": 7, "gelu": 3, "relu": 2, "squared_relu": 3}
"""The same for experts on a GPU, which multiply by the gate weight and add no offset."""


_BLOCK_ROWS = 512
"""As `model.moe.expert_loop.BLOCK_ROWS`."""


def dense(experiment: Experiment, inner_width: int, share: Share, module: str) -> Part:
    """A feed-forward that every token passes, beside its input.

    Args:
        module: what `recompute.modules` calls it.
    """
    hidden_size, element = experiment.model.hidden_size, share.element
    inner = share.whole * inner_width / share.tensor * element
    kept = _DENSE_WIDTHS[experiment.model.activation] * inner
    # Gradients of the activation's input, or of its result and of the second matrix.
    second = hidden_size * inner_width / share.tensor * element
    working = inner + max(inner if experiment.model.activation in GATED else 0.0, second)
    return Part(0.0, kept + working) if module in share.modules else Part(kept, working)


def mixture(experiment: Experiment, layout: Layout, share: Share) -> Part:
    """Router, experts and shared experts, beside their input."""
    moe, hidden_size = experiment.moe, experiment.model.hidden_size
    assert moe is not None and moe.moe_ffn_hidden_size is not None and moe.moe_expert_activation is not None
    ranks = Ranks(
        layout.expert_model_parallel_size, layout.expert_tensor_parallel_size, moe.moe_ranks_per_node
    )
    rows = rows_of_experts(experiment, ranks, share)
    has_biases = experiment.model.mlp_bias
    loops = share.on_host and not (moe.moe_expert_dropout or has_biases)
    of_experts = (_in_a_loop if loops else _as_grouped_products)(experiment, moe, ranks, rows, share)
    kept = of_experts.kept + _routing(moe, hidden_size, rows, not loops or ranks.together > 1, share)
    working = of_experts.working
    if moe.moe_shared_expert_intermediate_size is not None:
        shared = dense(experiment, moe.moe_shared_expert_intermediate_size, share, "shared_experts")
        gate = 0.0
        if moe.moe_shared_expert_gate and "shared_experts" not in share.modules:
            gate = share.mine * hidden_size * share.element
        # They run last, so that their backward pass is over when that of the experts begins.
        working = max(working - shared.kept - gate, shared.working)
        kept += shared.kept + gate
    elif _router_size(moe) != share.element and not (loops and ranks.together == 1):
        # Router and experts have copies of their own, and nobody keeps what the norm made.
        kept -= 0.0 if "layernorm" in share.modules else share.mine * hidden_size * share.element
    return Part(0.0, kept + working) if "moe" in share.modules else Part(kept, working)


def _in_a_loop(experiment: Experiment, moe: MoE, ranks: Ranks, rows: float, share: Share) -> Part:
    """`expert_loop`: the rows that came, and those behind the first matrix. It works in blocks of the rows of
    one expert or some, and with the gradients of both matrices at once."""
    inner, halves = _inner(moe, ranks), 2 if moe.moe_expert_activation in GATED else 1
    hidden_size, here = experiment.model.hidden_size, moe.num_moe_experts / ranks.expert
    came = _rows_that_came(moe, hidden_size, ranks, rows, share)
    block = min(rows, max(_BLOCK_ROWS, rows / here * experiment.launch.expert_imbalance))
    products = 1 if share.element == _FP32 else 6  # of gate weights' gradients, in fp32
    working = block * (3 * hidden_size + (3 + halves + products) * inner)
    working += here * (halves + 1) * inner * hidden_size + share.mine * hidden_size
    if ranks.together > 1:
        working += 2 * rows * hidden_size
    kept = came * hidden_size + rows * inner * halves
    return Part(kept * share.element, working * share.element)


def _as_grouped_products(experiment: Experiment, moe: MoE, ranks: Ranks, rows: float, share: Share) -> Part:
    """A copy of each row, what is behind the first matrix, and what the activation keeps. The gate weights'
    product is computed in fp32."""
    assert moe.moe_expert_activation is not None
    hidden_size = experiment.model.hidden_size
    width, inner = rows * hidden_size * share.element, rows * _inner(moe, ranks) * share.element
    again = "moe_act" in share.modules
    widths = 2 if again and moe.moe_expert_activation in GATED else 1
    kept = width + inner * (widths if again else _EXPERT_WIDTHS[moe.moe_expert_activation])
    if moe.moe_expert_dropout:
        kept += inner / share.element  # which survive
    if experiment.model.mlp_bias:
        # The second one's rows, which are multiplied by gate weights, and which expert each row is of.
        kept += width / ranks.expert_tensor + 2 * _INT64 * rows
    second = moe.num_moe_experts / ranks.expert * _inner(moe, ranks) * hidden_size * share.element
    of_activation = inner * ((2 if share.element == _FP32 else 5) + (5 if again else 0))
    backward = second + max((2 if ranks.together > 1 else 1) * width + inner, of_activation)
    return Part(kept, max(3 * width, backward))


def _inner(moe: MoE, ranks: Ranks) -> float:
    """Inner width of an expert on one rank."""
    assert moe.moe_ffn_hidden_size is not None
    return moe.moe_ffn_hidden_size / ranks.expert_tensor


def rows_of_experts(experiment: Experiment, ranks: Ranks, share: Share) -> float:
    """Rows that the experts of the fullest rank compute: the mean times launch.expert_imbalance, or where
    experts drop what is beyond their capacity, that capacity."""
    moe = experiment.moe
    assert moe is not None
    even = share.mine * moe.moe_router_topk * ranks.expert_tensor
    factor = limit(moe.moe_expert_capacity_factor)
    if factor is not None:
        return even * (factor if ranks.expert > 1 else min(1.0, factor))
    return even * (experiment.launch.expert_imbalance if ranks.expert > 1 else 1.0)


def _rows_that_came(moe: MoE, hidden_size: int, ranks: Ranks, rows: float, share: Share) -> float:
    """Rows that a loop over the experts keeps as their input, beside the layer's own tokens."""
    if ranks.together == 1:
        return 0.0
    dispatcher = taken(moe, hidden_size, share.element, ranks)
    if dispatcher == "allgather":
        return share.mine * ranks.together
    if dispatcher == "deduplicated":
        e, k = moe.num_moe_experts, moe.moe_router_topk
        reached = 1 - comb(e - e // ranks.expert, k) / comb(e, k)
        return rows * reached * ranks.expert / k
    return rows


def _routing(moe: MoE, hidden_size: int, rows: float, are_sorted: bool, share: Share) -> float:
    """The router's input where it is not in its precision, scores, and where each row goes.

    Args:
        are_sorted: whether rows are copied in the order of experts, and their results put together.
    """
    size = _router_size(moe)
    kept = share.mine * hidden_size * size if size != share.element else 0.0
    # Tables of all experts: what weights are gathered from, scores that losses read, logits of the z-loss.
    of_scores = moe.moe_router_score_function == "sigmoid" or moe.moe_router_pre_softmax
    normalizes = moe.moe_router_logit_normalization is not None
    tables = 1 + (not of_scores and moe.moe_router_load_balancing_type not in ("none", ["none"]))
    tables += 2 * normalizes + ((of_scores or normalizes) and moe.moe_z_loss_coeff != 0)
    kept += share.mine * moe.num_moe_experts * size * tables
    # Chosen experts and their weights; where rows come from, where they go, and their weights.
    kept += share.mine * moe.moe_router_topk * (_INT64 + size)
    return kept + share.mine * moe.moe_router_topk * (2 + are_sorted) * _INT64 + rows * size


def _router_size(moe: MoE) -> int:
    return 8 if moe.moe_router_dtype == "fp64" else _FP32
