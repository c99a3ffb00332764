"""Run on a rank: a model over documents in one sample, and over each of them alone."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.schema import Data, Experiment
from megatron_moe.data.samples import ApartAtEnds
from megatron_moe.engine import groups, schedule
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan

EOD = 249
LENGTHS = (1, 13, 7, 11)
Found = tuple[Tensor, dict[str, Tensor]]
"""Token losses [tokens], and the gradients of their sum by parameter."""


def packed_and_alone(experiment: Experiment, reset_positions: bool) -> list[Found]:
    """Documents packed and kept apart, each alone, and packed without more."""
    its_plan = plan.make(experiment)
    groups.initialize_model_parallel(its_plan.layout, experiment.training.seed, 60)
    (model,) = build_chunks(experiment, its_plan, torch.float32)
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, EOD, (length,), generator=generator) for length in LENGTHS]
    documents = [torch.cat([document[:-1], torch.tensor([EOD])]) for document in documents]
    apart = Data(reset_attention_mask=True, reset_position_ids=reset_positions)
    return [
        _of_samples(model, [torch.cat(documents)], apart),
        _of_samples(model, documents, Data(reset_attention_mask=True)),
        _of_samples(model, [torch.cat(documents)], Data()),
    ]


class _Text:
    """One sample; its labels are its tokens, so that they don't depend on what follows."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = len(self.tokens)
        return {
            "tokens": self.tokens,
            "labels": self.tokens,
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }


def _of_samples(model: torch.nn.Module, texts: list[Tensor], data: Data) -> Found:
    model.zero_grad()
    losses = []
    for text in texts:
        sample = ApartAtEnds(_Text(text), data, EOD)[0]
        batch = schedule.share_of_context(
            {name: tensor[None] for name, tensor in sample.items()}, torch.device("cpu")
        )
        losses.append(
            model(batch["tokens"], batch["position_ids"], batch.get("segments"), labels=batch["labels"])
        )
        losses[-1].sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat([loss.detach().flatten() for loss in losses]), gradients
