"""A microbatch through this rank's model chunk, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.model.moe.marks import mark
from megatron_moe.training.sample_metrics import tallies

Batch = Mapping[str, Tensor]
Loss = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
_Padding = TypeVar("_Padding", Tensor, Tensor | None)


def forward_step(
    batches: Iterator[Batch], chunk: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Tensor, Callable[[Tensor], object]]:
    """Megatron-Core's forward step: run one microbatch, return the output and the function that makes the
    loss of it.

    A batch holds tokens, labels and position_ids [b, s] and loss_mask [b, s], 0 where what follows a token is
    no target; where tokens are padding or prompt, also padding_mask [b, s], true for them: they count neither
    in the loss nor in the router's losses and statistics. Where routers look at more of a token than its
    hidden state, `run_positions` [b, s] go to them with the tokens (see `model.moe.marks`). `num_targets` []
    counts the targets of the whole sequences, of which a context-parallel rank has a part. `segments` [m, 2]
    (see `engine.segments`) says where documents end that must not see each other; `by_source` [b, sources],
    1 in one column, where each sequence comes from, if that is to be reported. `mean_targets` [], where it is
    there, takes the place of `num_targets` in the loss (see `engine.schedule.mean_targets`), and
    `loss_weights` [b, s] that of `loss_mask`. With `sample_weights` and `filled` (see
    `data.instruction.samples`) the report has `sample_metrics.tallies` behind its other numbers.

    For a model that predicts several tokens at once it holds what `data.further_tokens` gives, and
    `further_targets` [D], the targets of each further prediction; where mean_targets are, also
    `mean_further_targets` [D]. Evaluation looks at the next token only.

    With `return_schedule_plan` the output is yet to be computed, by `moe.overlap_moe_expert_parallel_comm`:
    Megatron-Core's plan of it, to be run together with that of another microbatch's backward pass.
    """
    from megatron.core.utils import get_model_config

    batch = next(batches)
    # Every stage gets the mask: routers stand on all of them.
    marks = _marks(batch, batch.get("padding_mask"), batch["tokens"])
    predicts_further = chunk.training and "further_tokens" in batch
    if return_schedule_plan and marks is not None:
        raise InputError(
            "moe.overlap_moe_expert_parallel_comm does not go with padding, which its routers would count; "
            "leave it out"
        )
    compute: Any = chunk.build_schedule_plan if return_schedule_plan else chunk
    output = compute(
        batch["tokens"],
        batch["position_ids"],
        batch.get("segments"),
        labels=batch["labels"],
        **({} if marks is None else {"padding_mask": marks}),
        **({"further": _further(batch)} if predicts_further else {}),
    )
    if predicts_further:
        scale = get_model_config(chunk).mtp_loss_scaling_factor
        return output, partial(_with_tallies, batch, partial(_loss_of_all, batch, scale))
    divisor = batch.get("mean_targets", batch["num_targets"].clamp(min=1))
    weights = batch.get("loss_weights")
    loss = partial(_loss, batch["loss_mask"], divisor, batch.get("by_source"), weights=weights)
    return output, partial(_with_tallies, batch, loss)


def _marks(batch: Batch, padding: _Padding, tokens: Tensor) -> _Padding | Tensor:
    return mark(padding, tokens, batch["run_positions"]) if "run_positions" in batch else padding


def _further(batch: Batch) -> list[Any]:
    """What each multi-token-prediction layer predicts from and towards."""
    from megatron_moe.model.multi_token import Further

    names = ("further_tokens", "further_labels", "further_padding")
    depths = zip(*(batch[name].unbind(-1) for name in names), strict=True)
    return [Further(tokens, labels, _marks(batch, padding, tokens)) for tokens, labels, padding in depths]


def _loss_of_all(batch: Batch, scale: float, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_loss` of the next token, plus `scale` times the mean over the further ones of theirs, each over its
    own targets. The report has two numbers of the first and of each of the others: [2 + 2 D].

    Args:
        losses: [1 + D, b, s].
    """
    divisor = batch.get("mean_targets", batch["num_targets"].clamp(min=1))
    loss, count, report = _loss(batch["loss_mask"], divisor, None, losses[0])
    divisors = batch.get("mean_further_targets", batch["further_targets"].clamp(min=1)).unbind()
    reports, depths = [report], len(divisors)
    for its_losses, mask, its_divisor in zip(
        losses[1:], batch["further_mask"].unbind(-1), divisors, strict=True
    ):
        further, _, report = _loss(mask, its_divisor, None, its_losses)
        loss = loss + further * (scale / depths)
        reports.append(report)
    return loss, count, torch.cat(reports)


def _with_tallies(batch: Batch, loss: Loss, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `loss` gives, the report with the batch's tallies where it has samples.

    Args:
        losses: [b, s], or [1 + D, b, s] with those of further tokens.
    """
    result, count, report = loss(losses)
    if "sample_weights" in batch:
        next_losses = losses[0] if losses.dim() == 3 else losses
        report = torch.cat([report, tallies(batch, next_losses)])
    return result, count, report


def _loss(
    loss_mask: Tensor,
    divisor: Tensor,
    by_source: Tensor | None,
    losses: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, times `weights` if there are any, over `divisor`, 1, and a report of token
    losses and targets for the metrics: [2], or [2 x sources] with `by_source`.

    Megatron-Core divides by the second and by the microbatches, in place: the report is a copy. And it takes
    the mean over context-parallel ranks, where the sum is meant: each has other tokens of the same sequences,
    and with padding not as many as the others.
    """
    from megatron.core import parallel_state

    mask = loss_mask.reshape(-1).float()
    total = (losses.float().reshape(-1) * mask).sum()
    report = torch.stack([total.detach().double(), mask.sum().double()])
    if by_source is not None:
        masked = losses.detach().double() * loss_mask
        sums = torch.stack([masked.sum(1), loss_mask.double().sum(1)], dim=1)
        report = (by_source.double().T @ sums).flatten()
    if weights is not None:
        total = (losses.float() * weights).sum()
    loss = total * parallel_state.get_context_parallel_world_size() / divisor
    return loss, torch.ones_like(divisor, dtype=torch.int), report
