"""Activations that a piece keeps for its backward pass, and what it needs beside while it runs.

Everything is read off the code that runs: `model/` and Megatron-Core's layers with the `native` spec. A
tensor counts where the operation behind it saves it; a view keeps the whole tensor it looks into. Letters:

    T   tokens of a microbatch that this rank's matrices see: s * b / CP
    t   tokens between them: T / TP under sequence parallelism, else T
    h   hidden_size; n, g heads and key heads of this rank, d their width
    f   inner width of a feed-forward on this rank
    r   rows that this rank's experts compute
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_moe.config.capacity_factor import limit
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.model import MultiLatentAttention
from megatron_moe.config.schema.moe import MoE
from megatron_moe.plan.costs import padded_vocab_size
from megatron_moe.plan.journeys import Ranks, taken
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.precision import element_size, on_host
from megatron_moe.plan.units import Activations, Kind
from megatron_moe.plan.weights import kind_of_mtp_layers


class Share(NamedTuple):
    """What of a microbatch a rank computes, and in which elements."""

    whole: float
    """T."""
    mine: float
    """t."""
    element: int
    on_host: bool
    tensor: int
    context: int

    @classmethod
    def of(cls, experiment: Experiment, layout: Layout) -> Share:
        training = experiment.training
        whole = training.micro_batch_size * training.seq_length / layout.context_parallel_size
        tensor = layout.tensor_model_parallel_size
        return cls(
            whole=whole,
            mine=whole / tensor if experiment.parallel.sequence_parallel else whole,
            element=element_size(experiment),
            on_host=on_host(experiment),
            tensor=tensor,
            context=layout.context_parallel_size,
        )


class Part(NamedTuple):
    """Bytes of a part of a layer: kept for the backward pass, and for a while only."""

    kept: float
    passing: float


def activations(experiment: Experiment, layout: Layout, kind: Kind) -> Activations:
    """Of one piece on one rank, one microbatch; for `mtp` those of all multi-token-prediction layers without
    their losses, which the head computes."""
    share = Share.of(experiment, layout)
    if kind == "embedding":
        return _embedding(experiment, share)
    if kind == "head":
        return _head(experiment, share)
    if kind == "mtp":
        return _mtp(experiment, layout, share)
    return _layer(experiment, layout, share, kind == "moe")


def _embedding(experiment: Experiment, share: Share) -> Activations:
    """Token numbers; what is looked up is the first layer's input."""
    ids = 8 * share.whole
    passing = share.whole * experiment.model.hidden_size * share.element
    return Activations(kept=ids, kept_if_recomputed=ids, working=2 * passing)


def _head(experiment: Experiment, share: Share) -> Activations:
    """The final norm, and for each prediction the softmax in fp32 that stands in the logits' place."""
    model = experiment.model
    predictions = 1 + model.mtp_num_layers
    hidden = share.mine * model.hidden_size * share.element
    logits = share.whole * padded_vocab_size(experiment) / share.tensor
    kept = predictions * (2 * hidden + 4 * logits + 24 * share.whole)
    passing = logits * (share.element if share.element < 4 else 4)
    gathered = share.whole * model.hidden_size * share.element
    return Activations(kept=kept, kept_if_recomputed=hidden, working=passing + 2 * gathered)


def _mtp(experiment: Experiment, layout: Layout, share: Share) -> Activations:
    """Each layer's embedding, both norms and the joint projection's input, beside a transformer layer."""
    count, width = experiment.model.mtp_num_layers, experiment.model.hidden_size * share.element
    layer = _layer(experiment, layout, share, kind_of_mtp_layers(experiment) == "moe")
    own = share.mine * width * (1 + 1 + 2) + share.mine * width
    return Activations(
        kept=count * (layer.kept + own),
        kept_if_recomputed=count * layer.kept_if_recomputed,
        working=layer.working,
    )


def _layer(experiment: Experiment, layout: Layout, share: Share, has_experts: bool) -> Activations:
    """A transformer layer: two residual branches, each behind a norm."""
    model, modules = experiment.model, experiment.recompute.modules or ()
    width = model.hidden_size * share.element
    stream = share.mine * width
    latent = model.multi_latent_attention
    attention = _attention(experiment, share) if latent is None else _latent(experiment, share, latent)
    if has_experts:
        feed_forward = _mixture(experiment, layout, share)
    else:
        assert model.ffn_hidden_size is not None
        feed_forward = _feed_forward(model.activation, model.ffn_hidden_size, model.hidden_size, share)
    norms = 0.0 if "layernorm" in modules else 2 * stream
    kept = 2 * stream + norms + attention.kept + feed_forward.kept
    passing = max(attention.passing, feed_forward.passing)
    return Activations(kept=kept, kept_if_recomputed=stream, working=passing + 2 * stream)


def _attention(experiment: Experiment, share: Share) -> Part:
    """Grouped-query attention: what rotation made of queries and keys, the projection's whole output, in
    which the values lie, and the context with its normalisers."""
    model = experiment.model
    assert model.num_query_groups is not None and model.kv_channels is not None
    queries = share.whole * model.num_attention_heads * model.kv_channels / share.tensor * share.element
    keys = share.whole * max(1, model.num_query_groups / share.tensor) * model.kv_channels * share.element
    normalisers = 4 * share.whole * model.num_attention_heads / share.tensor
    if share.context > 1:
        seen = keys * (share.context + 0.5)
        kept = queries + 2 * seen + 2 * queries + normalisers
    else:
        kept = (queries + 2 * keys) + queries + keys + queries + normalisers
    return Part(kept=kept, passing=3 * queries + 4 * keys)


def _latent(experiment: Experiment, share: Share, latent: MultiLatentAttention) -> Part:
    """Multi-head latent attention: the narrow vectors before and behind their norms, and all heads' queries,
    keys and values."""
    heads = experiment.model.num_attention_heads / share.tensor
    query = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    value = heads * latent.v_head_dim
    narrow = latent.kv_lora_rank * 2 + latent.qk_pos_emb_head_dim + 2 * (latent.q_lora_rank or 0)
    kept = share.mine * narrow + share.whole * (2 * query + 2 * value)
    normalisers = 4 * share.whole * heads
    return Part(kept=kept * share.element + normalisers, passing=share.whole * 3 * query * share.element)


def _feed_forward(activation: str, inner_width: int, hidden_size: int, share: Share) -> Part:
    """Behind the first matrix and the activation: see `inner_widths`."""
    inner = share.whole * inner_width / share.tensor * share.element
    return Part(kept=_inner_widths(activation) * inner, passing=3 * inner)


def _inner_widths(activation: str) -> int:
    """How many times the inner width an unfused activation keeps. A gated one: both halves of its input, the
    gate's activation, and the product; relu and its square only what comes out."""
    return {"swiglu": 4, "geglu": 4, "gelu": 2, "relu": 1, "squared_relu": 2}[activation]


def _mixture(experiment: Experiment, layout: Layout, share: Share) -> Part:
    """Router, experts and shared experts of one layer."""
    moe, width = experiment.moe, experiment.model.hidden_size
    assert moe is not None and moe.moe_ffn_hidden_size is not None and moe.moe_expert_activation is not None
    modules = experiment.recompute.modules or ()
    rows = rows_of_experts(experiment, layout, share)
    inner = moe.moe_ffn_hidden_size / layout.expert_tensor_parallel_size
    halves = 2 if moe.moe_expert_activation in ("swiglu", "geglu") else 1
    if share.on_host:
        behind = halves * inner
    elif "moe_act" in modules:
        behind = halves * inner
    else:
        behind = (_inner_widths(moe.moe_expert_activation) + 1) * inner
    copied = rows if not share.on_host or layout.expert_model_parallel_size > 1 else 0.0
    experts = (copied * width + rows * behind) * share.element
    kept = experts + _router(moe, width, share)
    passing = rows * (2 * width + 3 * inner) * share.element
    if moe.moe_shared_expert_intermediate_size is not None and "shared_experts" not in modules:
        activation, size = experiment.model.activation, moe.moe_shared_expert_intermediate_size
        kept += _feed_forward(activation, size, width, share).kept
    if "moe" in modules:
        return Part(kept=0.0, passing=kept + passing)
    return Part(kept=kept, passing=passing)


def _router(moe: MoE, hidden_size: int, share: Share) -> float:
    """Hidden states in fp32, scores and choices."""
    copied = 4 * hidden_size if share.element < 4 else 0
    return share.mine * (copied + 8 * moe.num_moe_experts + moe.moe_router_topk * 40)


def rows_of_experts(experiment: Experiment, layout: Layout, share: Share) -> float:
    """r: rows that the experts of the fullest rank compute. Where nothing is dropped the mean times
    launch.expert_imbalance; else the capacity."""
    moe = experiment.moe
    assert moe is not None
    ranks = Ranks(layout.expert_model_parallel_size, layout.expert_tensor_parallel_size)
    even = share.mine * moe.moe_router_topk * ranks.expert_tensor
    factor = limit(moe.moe_expert_capacity_factor)
    if factor is not None:
        return even * factor
    return even * (experiment.launch.expert_imbalance if ranks.expert > 1 else 1.0)


def dispatcher(experiment: Experiment, layout: Layout, share: Share) -> str:
    """Which dispatcher the layout takes."""
    moe = experiment.moe
    assert moe is not None
    ranks = Ranks(
        layout.expert_model_parallel_size, layout.expert_tensor_parallel_size, moe.moe_ranks_per_node
    )
    return taken(moe, experiment.model.hidden_size, share.element, ranks)
