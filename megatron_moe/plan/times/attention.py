"""How long attention takes, by its parts."""

from __future__ import annotations

from megatron_moe.config.rule import set_value
from megatron_moe.config.schema.model import MultiLatentAttention
from megatron_moe.config.windows import keys_of_token
from megatron_moe.plan.times.collectives import all_gather_s, exposed_s
from megatron_moe.plan.times.kernels import Cost
from megatron_moe.plan.times.work import Work

_ROTATED = {True: 2, False: 10}
"""Reads and writes of each rotated element, in one kernel and in several."""


def attention(work: Work) -> tuple[Cost, Cost]:
    """Projections with rotation, and core attention with the gathering of keys and values before it."""
    latent = work.experiment.model.multi_latent_attention
    if latent is not None:
        return _latent(work, latent)
    model = work.experiment.model
    width, head = model.hidden_size, set_value(model.kv_channels)
    query, both = model.num_attention_heads * head, 2 * set_value(model.num_query_groups) * head
    projections = work.columns(width, query + both) + work.rows(query, width)
    if model.position_embedding_type == "rope":
        projections += _rotation(work, (query + both / 2) * model.rotary_percent)
    if model.qk_norm is not None:
        projections += _per_head(work, 2 * (query + both / 2), 3 * (query + both / 2))
    return projections, _core(work, head, head, both)


def _latent(work: Work, latent: MultiLatentAttention) -> tuple[Cost, Cost]:
    model = work.experiment.model
    width, heads = model.hidden_size, model.num_attention_heads
    key = latent.qk_head_dim + latent.qk_pos_emb_head_dim
    narrow = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    # Each rank takes its own tokens down.
    cost = work.kernels.product(work.here, width, narrow)
    cost += work.kernels.streamed(2 * narrow * work.here, 3 * narrow * work.here, 2)
    if latent.q_lora_rank is None:
        cost += work.columns(width, heads * key)
    else:
        cost += work.kernels.product(work.here, width, latent.q_lora_rank)
        cost += work.kernels.streamed(2 * latent.q_lora_rank * work.here, 3 * latent.q_lora_rank * work.here)
        cost += work.columns(latent.q_lora_rank, heads * key)
    cost += work.columns(latent.kv_lora_rank, heads * (latent.qk_head_dim + latent.v_head_dim))
    cost += work.rows(heads * latent.v_head_dim, width)
    cost += _rotation(work, 2 * heads * latent.qk_pos_emb_head_dim)
    # Queries and keys are put together of their two parts.
    cost += _per_head(work, 4 * heads * key, 4 * heads * key)
    return cost, _core(work, key, latent.v_head_dim, heads * (key + latent.v_head_dim))


def _rotation(work: Work, width: float) -> Cost:
    passes = _ROTATED[work.experiment.model.apply_rope_fusion]
    return _per_head(work, passes * width, passes * width, 2 if passes == 2 else 8)


def _per_head(work: Work, forward: float, backward: float, kernels: int = 2) -> Cost:
    """What reads and writes so many elements a token, over all heads."""
    tokens = work.tokens / work.tensor
    return work.kernels.streamed(forward * tokens, backward * tokens, kernels)


def _core(work: Work, key: int, value: int, both: float) -> Cost:
    """Causal scores, half of the square, and what they weigh. Of layers with and without a window the mean.

    Args:
        both: width of all heads' keys and values together.
    """
    experiment = work.experiment
    length = keys_of_token(experiment)
    heads = experiment.model.num_attention_heads / work.tensor
    cost = work.kernels.scores(work.tokens * length * heads * (key + value))
    if work.layout.context_parallel_size == 1:
        return cost
    size = work.tokens * work.layout.context_parallel_size * both / work.tensor * work.size
    gather_s = all_gather_s(work.cluster, work.groups.context, size)
    if experiment.model.spec == "native":
        return cost + Cost(gather_s, gather_s)
    # Transformer Engine passes keys and values on from rank to rank while it computes.
    return cost + Cost(
        exposed_s(work.cluster, gather_s, cost.forward_s),
        exposed_s(work.cluster, 2 * gather_s, cost.backward_s),
    )
