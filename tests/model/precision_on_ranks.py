"""Run on ranks: in which precision a MoE layer sends what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.plan import plan
from megatron_moe.training.build import start

SENDS = (
    "all_to_all_single",
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "all_gather",
    "reduce_scatter",
)


def what_travels(experiment: Experiment, run: Path) -> tuple[list[str], str]:
    """Types of all that is sent by one MoE layer, forward and backward, and has a hidden state in each row;
    the type of what the layer returns."""
    trainer = start(experiment, plan.make(experiment), run)
    layer: Any = unwrap(trainer.chunks[0]).decoder.layers[0].mlp
    hidden = experiment.model.hidden_size
    sent: list[str] = []
    plain = {name: getattr(dist, name) for name in SENDS}

    def watched(name: str) -> Any:
        def send(*args: Any, **kwargs: Any) -> Any:
            flat = [part for value in args for part in (value if isinstance(value, list) else [value])]
            tensors = [value for value in flat if isinstance(value, torch.Tensor)]
            sent.extend(str(value.dtype) for value in tensors if value.dim() > 1 and value.size(-1) == hidden)
            return plain[name](*args, **kwargs)

        return send

    for name in SENDS:
        setattr(dist, name, watched(name))
    try:
        dtype = next(layer.experts.parameters()).dtype
        tokens = torch.randn(16, 2, hidden, dtype=dtype, requires_grad=True)
        output, _ = layer(tokens)
        there = len(sent)
        output.float().square().sum().backward()
        assert len(sent) > there > 0, "both ways"
    finally:
        for name in SENDS:
            setattr(dist, name, plain[name])
    return sent, str(output.dtype)
