"""Norms and attention: `model/norms.py`, `model/attention.py`, Megatron-Core's SelfAttention and
MLASelfAttention."""

from __future__ import annotations

from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.model import Model, MultiLatentAttention
from megatron_moe.config.windows import windowed_layers
from megatron_moe.plan.costs.activations.share import Part, Share

_FP32 = 4

_ROWS_OF_A_MASK = 256
"""As `model.causal._ROWS`."""


def norm(normalization: str, rows: float, width: float, share: Share, has_input: bool = True) -> float:
    """Bytes kept of a norm: input, output, and one or two numbers a row.

    On a host an RMSNorm is not fused: it also keeps the normalised rows, and in bf16 these and the input in
    fp32, so that nobody keeps the input itself.

    Args:
        has_input: whether the input counts here, and not where it comes from.
    """
    numbers = _FP32 * rows * (1 if normalization == "RMSNorm" else 2)
    if not _keeps_input(normalization, share):
        return rows * width * (2 * _FP32 + share.element) + numbers
    normalised = normalization == "RMSNorm" and share.on_host
    return rows * width * share.element * (1 + has_input + normalised) + numbers


def _keeps_input(normalization: str, share: Share) -> bool:
    return not (share.on_host and normalization == "RMSNorm" and share.element < _FP32)


def attention(experiment: Experiment, share: Share) -> Part:
    """What is kept behind the norm, up to the residual stream."""
    latent = experiment.model.multi_latent_attention
    if latent is not None:
        return _latent(experiment.model, share, latent)
    with_window = windowed_layers(experiment)
    return _grouped(experiment.model, share, sum(with_window) / len(with_window))


def _grouped(model: Model, share: Share, windowed: float) -> Part:
    """Grouped-query attention. The values are views of the projection's whole output, which therefore stays;
    rotation makes new queries and keys.

    Args:
        windowed: part of the layers that have a sliding window, for a mean over layers.
    """
    assert model.num_query_groups is not None and model.kv_channels is not None
    heads = model.num_attention_heads / share.tensor
    groups = max(1.0, model.num_query_groups / share.tensor)
    width, tokens = model.kv_channels, share.whole
    queries, keys = tokens * heads * width * share.element, tokens * groups * width * share.element
    projected = queries + 2 * keys
    rotates = model.position_embedding_type == "rope"
    # Heads of several groups lie apart from each other in the projection.
    copied = queries if heads > groups > 1 else 0.0
    kept = 0.0
    if model.qk_norm is not None:
        if model.qk_norm == "head":
            kept += _norms_of_heads(model, heads, groups, copied > 0, share)
        else:
            # Copies in fp32, and the same normalised, both of which the weights' gradient reads.
            kept += 2 * _FP32 * tokens * (heads + groups) * width
        copied = 0.0 if rotates else queries
    kept += _positions(model, width, share) if rotates else 0.0
    entering = queries + keys if rotates else copied
    if model.attention_sinks:
        # One more channel, of queries, keys and values that are copied for it, and of their context.
        wider = (width + 1) / width
        kept += queries * wider
        entering, projected = (queries + 2 * keys) * wider, 0.0
    working = 2 * queries + 2 * keys
    normalisers = _FP32 * tokens * heads
    if "core_attn" in share.modules:
        return Part(kept + projected + entering + queries, working + normalisers)
    kept += normalisers + _scores(model, heads, share)
    if share.context == 1:
        if share.length > _ROWS_OF_A_MASK:
            kept += windowed * queries  # the contexts of some rows each, which are put together
        return Part(kept + projected + entering + queries, working)
    # Keys and values of the whole sequence, up to the end of each of the two chunks; the context of both.
    seen = 2 * keys * (share.context + 0.5)
    return Part(kept + (entering - keys if rotates else projected) + seen + 2 * queries, working + 2 * keys)


def _norms_of_heads(model: Model, heads: float, groups: float, is_copied: bool, share: Share) -> float:
    """Norms of queries and keys, whose results only rotation reads."""
    width, tokens, element = model.kv_channels or 0, share.whole, share.element
    kept = 0.0
    for count, own in ((heads, is_copied), (groups, False)):
        kept += norm(model.normalization, tokens * count, width, share, has_input=own)
        kept -= tokens * count * width * element
    return kept


def _positions(model: Model, width: float, share: Share) -> float:
    """Cosines and sines of the positions, made once for the queries and once for the keys."""
    return 4 * share.length * width * model.rotary_percent * share.element


def _scores(model: Model, heads: float, share: Share) -> float:
    """Scores of s x s, which torch's fused attention on a host cannot spare under dropout."""
    if not share.on_host or not model.attention_dropout:
        return 0.0
    return 3 * _FP32 * share.batch * heads * share.length**2 * share.context


def _latent(model: Model, share: Share, latent: MultiLatentAttention) -> Part:
    """Multi-latent attention: the narrow vectors before and behind their norms, which each tensor-parallel
    rank has of its own tokens, and queries, keys and values of its heads."""
    heads, tokens, element = model.num_attention_heads / share.tensor, share.whole, share.element
    width = latent.qk_head_dim + latent.qk_pos_emb_head_dim
    queries, values = tokens * heads * width * element, tokens * heads * latent.v_head_dim * element
    narrow = norm(model.normalization, share.mine, latent.kv_lora_rank, share, has_input=False)
    if _keeps_input(model.normalization, share):
        # The norm's input is a view of it.
        narrow += share.mine * (latent.kv_lora_rank + latent.qk_pos_emb_head_dim) * element
    if latent.q_lora_rank is not None:
        narrow += norm(model.normalization, share.mine, latent.q_lora_rank, share)
    narrow += 4 * share.length * latent.qk_pos_emb_head_dim * element
    normalisers = _FP32 * tokens * heads
    if share.on_host and width != latent.v_head_dim:
        # torch's fused attention on a host wants heads of one width.
        normalisers = element * share.batch * heads * share.length**2 * share.context
    if "core_attn" in share.modules:
        return Part(narrow + 2 * queries + 2 * values, 2 * queries + normalisers)
    return Part(narrow + 2 * queries + 2 * values + normalisers, 2 * queries + 2 * values)
