"""Normalisation that knows sequence parallelism and needs neither apex nor Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as `config.normalization` says.

    Under sequence parallelism each tensor-parallel rank sees a part of the sequence; the mark
    `sequence_parallel` on the parameters makes Megatron-Core sum their gradients over the tensor-parallel
    group. Its own wrapper refuses that case. The result has the parameters' dtype, also where the residual
    stream is kept in float32.

    Args:
        config: TransformerConfig.
        hidden_size: h.
        eps: added to the variance.

    Shape: [..., h] -> [..., h].
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.to(hidden_states.dtype)
        if self.bias is None:
            normed = torch.nn.functional.rms_norm(hidden_states, self.shape, weight, self.eps)
        else:
            bias = self.bias.to(hidden_states.dtype)
            normed = torch.nn.functional.layer_norm(hidden_states, self.shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)
