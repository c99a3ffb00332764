"""Multi-latent attention with a cache of what is common to all heads.

Of a token the cache keeps the latent behind its norm and the rotated part of the key, kv_lora_rank +
qk_pos_emb_head_dim numbers, where keys and values of all heads would take heads times (qk_head_dim +
qk_pos_emb_head_dim + v_head_dim): for DeepSeek-V2 576 and 40,960, of DeepSeek-V3 likewise. Every
tensor-parallel rank keeps it whole.

One token each: the up-projection is moved from the keys to the query and from the values to the result, so
that attention happens between latents (DeepSeek-V2, section 2.1.2), and the cache is read as it is. Whole
prompts: keys and values are computed from the latents, which takes fewer operations there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.inference.cache import Cache
from megatron_moe.inference.rotary import Angles, Rotary
from megatron_moe.inference.step import Step
from megatron_moe.model.causal import attend


class CachedLatentAttention:
    """As `attention.CachedAttention`, on Megatron-Core's MLASelfAttention."""

    def __init__(self, module: Any, layer: int, rotary: Rotary | None) -> None:
        assert rotary is not None
        self.module, self.layer, self.rotary = module, layer, rotary
        config = module.config
        self.scale: float = module.core_attention.scale
        self.latent, self.rotated = config.kv_lora_rank, config.qk_pos_emb_head_dim
        self.plain, self.values = config.qk_head_dim, config.v_head_dim

    def __call__(self, hidden: Tensor, step: Step, cache: Cache | None, angles: Angles | None) -> Any:
        """[t, 1, h] -> [t, 1, h] and a bias to be added, or None."""
        assert angles is not None
        query, turned = self._queries(hidden, angles)
        kept = self._latents(hidden, angles)
        if cache is None:
            context = self._pieces(step, query, turned, kept, None)
        else:
            (stored,) = cache.store(self.layer, step, (kept,))
            if step.is_one_each:
                context = self._one_each(step, query, turned, stored)
            else:
                context = self._pieces(step, query, turned, kept, stored)
        return self.module.linear_proj(context.reshape(len(kept), 1, -1))

    def _queries(self, hidden: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """The plain and the rotated part [t, n, ..] of the queries of this rank's heads."""
        module = self.module
        if module.config.q_lora_rank is None:
            projected, _ = module.linear_q_proj(hidden)
        else:
            narrow, _ = module.linear_q_down_proj(hidden)
            projected, _ = module.linear_q_up_proj(module.q_layernorm(narrow))
        heads = projected.view(len(hidden), 1, -1, self.plain + self.rotated)
        plain, turned = heads.split([self.plain, self.rotated], dim=-1)
        return plain.squeeze(1), self.rotary(turned, angles).squeeze(1)

    def _latents(self, hidden: Tensor, angles: Angles) -> Tensor:
        """[t, latent + rotated]: what the cache keeps."""
        both, _ = self.module.linear_kv_down_proj(hidden)
        latent, key = both.split([self.latent, self.rotated], dim=-1)
        latent = self.module.kv_layernorm(latent)
        return torch.cat([latent, self.rotary(key.unsqueeze(2), angles).squeeze(2)], dim=-1).squeeze(1)

    def _one_each(self, step: Step, query: Tensor, turned: Tensor, stored: Tensor) -> Tensor:
        """[b, n, ..] of one token each -> [b, n, v]."""
        weight: Tensor = self.module.linear_kv_up_proj.weight
        of_heads = weight.view(-1, self.plain + self.values, self.latent)
        of_keys, of_values = of_heads.split([self.plain, self.values], dim=1)
        among_latents = torch.einsum("bnk,nkl->bnl", query, of_keys)
        rows = torch.cat([among_latents, turned], dim=-1).unsqueeze(1)
        keys = stored[: len(query), None, : step.longest]
        mask = step.mask(None, query.dtype)
        context = F.scaled_dot_product_attention(
            rows, keys, keys[..., : self.latent], attn_mask=mask, scale=self.scale
        )
        return torch.einsum("bnl,nvl->bnv", context.squeeze(1), of_values)

    def _pieces(
        self, step: Step, query: Tensor, turned: Tensor, kept: Tensor, stored: Tensor | None
    ) -> Tensor:
        """[t, n, ..] -> [t, n, v], piece by piece."""
        contexts, begin = [], 0
        for piece in step.pieces:
            end = begin + len(piece.tokens)
            latents = kept[begin:end]
            if piece.start and stored is not None:
                latents = stored[piece.slot, : piece.end]
            key, value = self._keys_and_values(latents)
            whole = torch.cat([query[begin:end], turned[begin:end]], dim=-1)
            batched = (x.transpose(0, 1).unsqueeze(0) for x in (whole, key, value))
            contexts.append(attend(*batched, scale=self.scale).squeeze(0).transpose(0, 1))
            begin = end
        return torch.cat(contexts)

    def _keys_and_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[S, latent + rotated] -> keys [S, n, plain + rotated] and values [S, n, v]."""
        latent, turned = latents.split([self.latent, self.rotated], dim=-1)
        projected, _ = self.module.linear_kv_up_proj(latent)
        plain, values = projected.view(len(latents), -1, self.plain + self.values).split(
            [self.plain, self.values], dim=-1
        )
        shared = turned.unsqueeze(1).expand(-1, plain.size(1), -1)
        return torch.cat([plain, shared], dim=-1), values
