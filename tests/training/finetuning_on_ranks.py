"""What the tests of frozen weights and adapters do on their ranks."""

from __future__ import annotations

import torch

from megatron_moe.engine import pieces
from megatron_moe.model.initialization import generator_of
from megatron_moe.training.trainer import Trainer


@torch.no_grad()
def draw_adapters(trainer: Trainer) -> None:
    """Give each B numbers of its own, the same in every layout: while it is 0, A has no gradient."""
    for piece in pieces.of_weights(trainer.chunks):
        if ".lora_b" in piece.name:
            drawn = torch.randn(piece.shape, generator=generator_of(7, piece.name)) / 10
            piece.data.copy_(drawn[piece.where])
