"""Rotary positions stretched to longer sequences, as `transformers` computes them
(`modeling_rope_utils.ROPE_INIT_FUNCTIONS`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.schema import RotaryScaling
from megatron_moe.config.schema.model import Model


def scale_frequencies(chunk: torch.nn.Module, model: Model) -> None:
    """Give a GPTModel that has rotary positions, but not in multi-latent attention, those of the model."""
    if model.rotary_scaling is None:
        return
    rotary: Any = chunk.rotary_pos_emb
    rotary.inv_freq = frequencies(model).to(rotary.inv_freq.device)


def frequencies(model: Model) -> Tensor:
    """[d / 2] fp32 radians a position, of the d rotated channels of a head."""
    assert model.kv_channels is not None
    width = int(model.kv_channels * model.rotary_percent)
    plain = 1.0 / model.rotary_base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaling = model.rotary_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    share = _share_of_plain(plain, model.rotary_base, scaling)
    return (1 - share) * plain / scaling.factor + share * plain


def _share_of_plain(plain: Tensor, base: float, scaling: RotaryScaling) -> Tensor:
    """[d / 2] from 0, slowed down by the whole factor, to 1, as it was."""
    length = scaling.original_max_position_embeddings
    assert length is not None
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return ((length * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    width = 2 * len(plain)

    def channel(turns: float) -> float:
        """The one that turns so often within the original length."""
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    return 1 - ((torch.arange(len(plain), dtype=torch.float32) - first) / (last - first)).clamp(0, 1)


def softmax_scale(model: Model) -> float | None:
    """Factor of the scores where it is not 1 / sqrt(kv_channels): rotated queries and keys that are both
    multiplied by a number have scores multiplied by its square."""
    scaling = model.rotary_scaling
    if scaling is None or scaling.kind != "yarn":
        return None
    assert model.kv_channels is not None
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0
    return factor**2 / math.sqrt(model.kv_channels)
