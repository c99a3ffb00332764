"""Run on one rank: gradients of the loss a token against float64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from train_on_ranks import begin
from verify_on_ranks import pad

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import gradients, groups
from megatron_moe.engine.checkpoint import unwrap


def against_float64(experiment: Experiment, folder: Path) -> dict[str, float]:
    """Relative difference of each weight's gradient in the first step, over samples with padding."""
    trainer = begin(experiment, folder / "trained")
    pad(trainer)
    found: dict[str, Tensor] = {}

    def look() -> None:
        for name, weight in unwrap(trainer.chunks[0]).named_parameters():
            found[name] = weight.main_grad.double().clone()  # type: ignore[attr-defined]

    with gradients.watched(trainer.chunks, look):
        trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    groups.destroy()
    expected = by_hand(experiment, folder / "by hand")
    return {
        name: float((found[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items()
    }


def by_hand(experiment: Experiment, folder: Path) -> dict[str, Tensor]:
    """Gradients of: cross entropy summed over all targets / their number, and the routers' losses, a mean
    over microbatches."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    trainer = begin(experiment, folder)
    pad(trainer)
    model = unwrap(trainer.chunks[0]).double()
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    microbatches = [next(batches) for _ in range(trainer.shapes().num_microbatches)]
    counts = [float(batch["loss_mask"].sum()) for batch in microbatches]
    assert len(set(counts)) > 1, "microbatches must differ, or every mean is the same"
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1.0 / len(microbatches)))
    total = torch.zeros((), dtype=torch.float64)
    for batch in microbatches:
        padding = {"padding_mask": batch["padding_mask"]} if "padding_mask" in batch else {}
        logits = model(batch["tokens"], batch["position_ids"], None, **padding)
        losses = -logits.log_softmax(dim=-1).gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
        total = total + (losses * batch["loss_mask"]).sum() / sum(counts)
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, weights), strict=True))
