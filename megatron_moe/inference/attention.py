"""Attention of new tokens to those in the cache, of sequences of different lengths at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.inference.cache import Cache
from megatron_moe.inference.rotary import Angles, Rotary
from megatron_moe.inference.step import Step
from megatron_moe.model.causal import attend


class CachedAttention:
    """The self-attention of a layer in inference, on the weights of the module that training has.

    What tokens make of queries, keys and values (projections, biases, norms) is that module's; here are
    positions, the cache and the attention itself.

    Args:
        module: Megatron-Core's SelfAttention, or one that derives from it.
        layer: its number on this rank.
        rotary: None where positions are no business of attention.
    """

    def __init__(self, module: Any, layer: int, rotary: Rotary | None) -> None:
        self.module, self.layer, self.rotary = module, layer, rotary
        core = module.core_attention
        self.scale: float = core.scale
        self.window: int | None = core.window
        self.sinks: Tensor | None = core.softmax_offset

    def __call__(self, hidden: Tensor, step: Step, cache: Cache | None, angles: Angles | None) -> Any:
        """[t, 1, h] -> [t, 1, h] and a bias to be added, or None."""
        query, key, value = self.module.get_query_key_value_tensors(hidden)
        if self.rotary is not None and angles is not None:
            # In one go: with a token or a few it is the calls that take time.
            sizes = query.size(2), key.size(2)
            query, key = self.rotary(torch.cat([query, key], dim=2), angles).split(sizes, dim=2)
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if cache is None:
            context = self._pieces(step, query, key, value, None)
        else:
            kept = cache.store(self.layer, step, (key, value))
            if step.is_one_each:
                context = self._one_each(step, query, *kept)
            else:
                context = self._pieces(step, query, key, value, kept)
        return self.module.linear_proj(context.reshape(query.size(0), 1, -1))

    def _one_each(self, step: Step, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[b, n, d] of one token each -> [b, n, d]. The queries of a key are its rows: none is copied."""
        batch, heads, groups = query.size(0), query.size(1), keys.size(2)
        rows = query.reshape(batch, groups, heads // groups, -1)
        key, value = (x[:batch, : step.longest].transpose(1, 2) for x in (keys, values))
        mask = step.mask(self.window, query.dtype)
        if self.sinks is None:
            context = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=self.scale)
        else:
            scores = rows @ key.transpose(-1, -2) * self.scale
            scores = scores if mask is None else scores + mask
            sinks = self.sinks.view(1, groups, -1, 1).expand(batch, -1, -1, -1)
            context = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1] @ value
        return context.reshape(batch, heads, -1)

    def _pieces(
        self, step: Step, query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, ...] | None
    ) -> Tensor:
        """[t, n, d] -> [t, n, d], piece by piece."""
        contexts, begin = [], 0
        for piece in step.pieces:
            end = begin + len(piece.tokens)
            own = (key[begin:end], value[begin:end])
            if piece.start and kept is not None:
                own = (kept[0][piece.slot, : piece.end], kept[1][piece.slot, : piece.end])
            batched = (x.transpose(0, 1).unsqueeze(0) for x in (query[begin:end], *own))
            context = attend(*batched, scale=self.scale, window=self.window, sinks=self.sinks)
            contexts.append(context.squeeze(0).transpose(0, 1))
            begin = end
        return torch.cat(contexts)
