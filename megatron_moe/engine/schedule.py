"""One pass of Megatron-Core's pipeline schedule, and one optimizer step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_moe.engine import overlap
from megatron_moe.engine.segments import chunks_of_rank, segments

ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Callable[[Tensor], Any]]]
"""(microbatches, model chunk) -> (output, loss function); Megatron-Core's contract."""


class Timers(Protocol):
    """What can take the place of Megatron-Core's timers for a while."""

    def attached(self, config: Any) -> contextlib.AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Shapes:
    """What the pipeline sends: microbatches b of sequences s."""

    num_microbatches: int
    micro_batch_size: int
    seq_length: int


def prepare(config: Any, optimizer: Any, chunks: list[torch.nn.Module]) -> None:
    """Give the schedule its hooks for gradients and weights.

    Args:
        config: the TransformerConfig that the model chunks hold.
        chunks: wrapped model chunks of this rank.
    """
    from megatron.core.distributed import finalize_model_grads

    overlap.connect(config, chunks)

    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss


def run(
    chunks: list[torch.nn.Module],
    batches: list[Iterator[Any]],
    forward_step: ForwardStep,
    shapes: Shapes,
    forward_only: bool = False,
    stopwatch: Timers | None = None,
) -> list[Any]:
    """Forward, and unless `forward_only` backward, over all microbatches of this replica.

    Args:
        batches: one iterator over the replica's microbatches for each chunk.
        stopwatch: is told what the schedule does.

    Returns:
        What the loss function reported for each microbatch; empty except on the last stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    measured: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if stopwatch is not None:
        measured = stopwatch.attached(get_model_config(chunks[0]))
    with measured:
        reports: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=shapes.num_microbatches,
            seq_length=shapes.seq_length,
            micro_batch_size=shapes.micro_batch_size,
            forward_only=forward_only,
        )
    return reports


@dataclass(frozen=True)
class Pass:
    """One microbatch, forward or backward, through one of a rank's model chunks; all count from 0."""

    kind: Literal["F", "B"]
    microbatch: int
    chunk: int


def passes(num_microbatches: int, pipeline_size: int, chunks: int) -> list[Pass]:
    """The passes of a rank: all forward ones in their order, then all backward ones in theirs."""
    if chunks == 1:
        order = [(microbatch, 0) for microbatch in range(num_microbatches)]
    else:
        from megatron.core.pipeline_parallel.schedules import get_schedule_table

        order = get_schedule_table(num_microbatches, chunks, pipeline_size)
    forward = [Pass("F", microbatch, chunk) for microbatch, chunk in order]
    return forward + [Pass("B", microbatch, chunks - 1 - chunk) for microbatch, chunk in order]


def zero_gradients(chunks: list[torch.nn.Module], optimizer: Any) -> None:
    """Empty the gradient buffers before a step."""
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.zero_grad()


def update(optimizer: Any, chunks: list[torch.nn.Module]) -> tuple[bool, float]:
    """Clip and step, unless the gradient norm is not finite: then the weights stay as they are.

    As Megatron-Core's ChainedOptimizer.step, which would step all the same.

    Returns:
        whether the weights were updated; the global gradient norm before clipping.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return False, norm
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                # Where the optimizer reads gradients of a dtype of its own.
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    updated = bool(optimizer.step_with_ready_grads())
    overlap.weights_updated(chunks)
    return updated, norm


def share_of_reports(reports: list[Tensor], device: torch.device, width: int = 2) -> Tensor:
    """[width] this rank's part of the sum of all reports; adding up all ranks' parts gives it once."""
    from megatron.core import parallel_state

    # The tensor-parallel ranks of a stage report the same: one speaks.
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        return torch.stack(reports).sum(0)
    return torch.zeros(width, dtype=torch.float64, device=device)


def sum_over_ranks(reports: list[Tensor], device: torch.device, width: int = 2) -> list[float]:
    """Sum of the last stages' reports, each [width], over all replicas, on every rank."""
    total = share_of_reports(reports, device, width)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total]


def mean_targets(microbatches: Sequence[Mapping[str, Tensor]], counts: str = "num_targets") -> Tensor:
    """[] or [D] The targets (or samples) of the global batch over its microbatches; 1 where there is none. A
    collective over the replicas.

    Dividing by it what each microbatch's losses sum up to makes the mean over microbatches and replicas the
    mean over all targets. Megatron-Core's own way, `calculate_per_token_loss`, divides all gradients by the
    targets in the end, those of the routers' losses too, which are means over microbatches.

    Args:
        microbatches: this replica's, as `share_of_context` gives them.
        counts: what of them counts targets.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    total = torch.stack([batch[counts] for batch in microbatches]).sum(0)
    torch.distributed.all_reduce(total, group=group)
    return total.clamp(min=1) / (len(microbatches) * group.size())


def share_of_context(
    batch: dict[str, Tensor], device: torch.device, with_run_positions: bool = False
) -> dict[str, Tensor]:
    """A microbatch on `device`, cut to this context-parallel rank's two chunks of each sequence.

    It also gets `num_targets` [], the targets of the whole sequences, where a `further_mask` [b, s, D] is
    likewise `further_targets` [D], where there are `sample_weights` `num_samples` [], those of the whole
    sequences added up, and in place of `document_starts` the `segments` that attention goes by (see
    `engine.segments`). A `padding_mask` without padding is left out.
    In place of `sample_numbers` come, where they are wanted, `run_positions` [b, s]: each token's place among
    all tokens of the run. All this is found on the host, so that no GPU has to be waited for.
    """
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    batch = dict(batch)
    mine = {"num_targets": batch["loss_mask"].sum().to(torch.int)}
    if (further := batch.get("further_mask")) is not None:
        mine["further_targets"] = further.sum((0, 1)).to(torch.int)
    if (weights := batch.get("sample_weights")) is not None:
        mine["num_samples"] = weights.sum()
    if (starts := batch.pop("document_starts", None)) is not None:
        mine["segments"] = segments(starts, rank, size)
    if (by_source := batch.pop("by_source", None)) is not None:
        mine["by_source"] = by_source
    if (numbers := batch.pop("sample_numbers", None)) is not None and with_run_positions:
        length = batch["tokens"].size(1)
        batch["run_positions"] = numbers[:, None] * length + torch.arange(length)
    if "padding_mask" in batch and not bool(batch["padding_mask"].any()):
        del batch["padding_mask"]
    for name, tensor in batch.items():
        if size > 1:
            # Megatron-Core's function for it takes other arguments in each version.
            chunks = tensor.chunk(2 * size, dim=1)
            tensor = torch.cat([chunks[chunk] for chunk in chunks_of_rank(rank, size)], dim=1)
        mine[name] = tensor
    return {name: tensor.to(device, non_blocking=True) for name, tensor in mine.items()}
