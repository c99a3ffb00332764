"""Multi-latent attention of Megatron-Core, with blocks that need no Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


class LatentAttention(MLASelfAttention):
    """Megatron-Core's, with the norms and projections that the spec names.

    Its 0.19 derives them from the config a second time, and wants Transformer Engine's for a norm behind a
    narrow projection beside queries that are projected at once.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class DownProjection(torch.nn.Module):
    """A narrow projection, which each tensor-parallel rank holds whole and applies to its own part of the
    sequence.

    Megatron-Core's own without Transformer Engine cuts the matrix, and then leaves of the gradient of the
    keys' rotated part, which all heads share, what other ranks' heads contribute out (seen with 0.16.1 and
    0.19.2).

    Args: as Megatron-Core's builders of linear layers.

    Shape: [s, b, h] -> [s, b, n], and no bias.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__()
        assert not kwargs.get("bias"), "narrow projections have none"
        device = torch.cuda.current_device()
        weight = torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        # Each rank sees other tokens: gradients are summed.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.linear(hidden_states, self.weight), None
