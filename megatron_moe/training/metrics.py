"""The metrics of a step: one table, from sums over the global batch to the numbers in metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.capacity_factor import limit
from megatron_moe.config.errors import RunError
from megatron_moe.config.schema import Experiment
from megatron_moe.engine.schedule import share_of_reports
from megatron_moe.training.balance_metrics import BalanceSums, local_balance, split_balance
from megatron_moe.training.moe_sums import MoESums, local_drops, local_sums, split
from megatron_moe.training.sample_metrics import SampleSums, counted, split_tallies


@dataclass(frozen=True)
class StepSums:
    """What a step came to over all ranks.

    Attributes:
        loss: sum of the language-model losses of all target tokens of the global batch.
        targets: number of those tokens.
        further: the same two of each multi-token-prediction layer.
        samples: None for data without samples.
        stop_requested: whether any rank was asked to stop.
        moe: None for a dense model; the same for balance.
    """

    loss: float
    targets: float
    further: tuple[tuple[float, float], ...]
    samples: SampleSums | None
    stop_requested: bool
    moe: MoESums | None
    balance: BalanceSums | None


def reduce_step(
    experiment: Experiment,
    chunks: list[torch.nn.Module],
    reports: list[Tensor],
    stop_requested: bool,
    device: torch.device,
) -> StepSums:
    """Sum over all ranks what each has seen of the step: one collective over the world, and every rank takes
    part.

    Raises RunError on all ranks where a router of any got logits that are not finite.

    Args:
        reports: [loss sum, targets] a microbatch, and behind these the same for each multi-token-prediction
            layer, then `sample_metrics.tallies`, on the last pipeline stage; else empty.
    """
    losses = 2 + 2 * experiment.model.mtp_num_layers
    width = losses + counted(experiment)
    stop = torch.tensor([float(stop_requested)], dtype=torch.float64, device=device)
    parts = [share_of_reports(reports, device, width), stop]
    local = None
    if experiment.moe is not None:
        local = local_sums(experiment, chunks, device)
        parts += [local.total.flatten(), local_balance(experiment, chunks, device).flatten()]
    total = torch.cat(parts)
    dist.all_reduce(total)
    total = total.cpu()
    moe = balance = None
    if local is not None and experiment.moe is not None:
        begin, size = width + 1, local.total.numel()
        moe = split(total[begin : begin + size].view(len(local.total), -1), experiment.moe.num_moe_experts)
        balance = split_balance(total[begin + size :].view(len(local.total), -1))
        if bool(moe.column("not_finite").any()):
            raise RunError(_not_finite(local.not_finite))
    (loss, targets), *further = total[:losses].view(-1, 2).tolist()
    samples = split_tallies(total[losses:width].tolist())
    stops = float(total[width]) > 0
    return StepSums(loss, targets, tuple(map(tuple, further)), samples, stops, moe, balance)


def further_metrics(sums: StepSums) -> dict[str, Any]:
    """The losses of multi-token prediction: each layer's mean over its own targets, and the mean of these."""
    losses = [loss / targets if targets else math.nan for loss, targets in sums.further]
    record: dict[str, Any] = {"mtp/loss": sum(losses) / len(losses)}
    return record if len(losses) == 1 else record | {"mtp/per_depth/loss": losses}


def _not_finite(of_rank: Tensor) -> str:
    """Which router got logits that are not finite, and on which ranks: the first layer, whose output spoils
    those behind it. Collective over all ranks."""
    of_ranks = [torch.empty_like(of_rank) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, of_rank)
    broken = torch.stack(of_ranks) > 0
    layer = int(broken.any(0).nonzero()[0])
    ranks = broken[:, layer].nonzero().flatten().tolist()
    named, more = ", ".join(map(str, ranks[:8])), len(ranks) - 8
    where = f"rank{'s' * (len(ranks) > 1)} {named}" + (f" and {more} more" if more > 0 else "")
    return (
        f"the router of layer {layer + 1} got logits that are NaN or infinite on {where}, and no weight was "
        "updated; if it does so again when resumed, start a run of another name with a lower optimizer.lr"
    )


MOE_METRICS: dict[str, Callable[[MoESums, Experiment], float]] = {
    "moe/aux_loss": lambda sums, _: _mean_over_layers(sums, "aux_loss", "microbatches"),
    "moe/z_loss": lambda sums, _: _mean_over_layers(sums, "z_loss", "microbatches"),
    "moe/drop_rate": lambda sums, _: _ratio(sums.column("dropped").sum(), sums.column("assigned").sum()),
    "moe/would_drop_rate": lambda sums, _: _ratio(
        sums.column("would_drop").sum(), sums.column("assigned").sum()
    ),
    "moe/load_max_over_mean": lambda sums, _: _mean(_load_max_over_mean(sums)),
    "moe/dead_experts": lambda sums, _: int((_moe_rows(sums.load, sums) == 0).sum()),
    "moe/router_entropy": lambda sums, _: _mean(_quotients(sums, "entropy", "tokens")),
}
"""Every step: key -> number."""

LAYER_METRICS: dict[str, Callable[[MoESums, Experiment], list[float]]] = {
    "moe/per_layer/drop_rate": lambda sums, _: _quotients(sums, "dropped", "assigned"),
    "moe/per_layer/would_drop_rate": lambda sums, _: _quotients(sums, "would_drop", "assigned"),
    "moe/per_layer/load_max_over_mean": lambda sums, _: _load_max_over_mean(sums),
    "moe/per_layer/dead_experts": lambda sums, _: (sums.load == 0).sum(1).tolist(),
    "moe/per_layer/router_entropy": lambda sums, _: _quotients(sums, "entropy", "tokens"),
    "moe/per_layer/top1_over_top2": lambda sums, _: _quotients(sums, "top1", "top2"),
    "moe/per_layer/top2_over_top3": lambda sums, _: _quotients(sums, "top2", "top3"),
}
"""Every `logging.detail_interval` steps: key -> one number a layer, NaN where the layer is dense."""


def moe_metrics(sums: MoESums, experiment: Experiment, detailed: bool) -> dict[str, Any]:
    """The MoE part of a step's record."""
    record: dict[str, Any] = {key: compute(sums, experiment) for key, compute in MOE_METRICS.items()}
    assert experiment.moe is not None
    if detailed:
        dense = (sums.column("microbatches") == 0).tolist()
        for key, compute_layers in LAYER_METRICS.items():
            values = compute_layers(sums, experiment)
            record[key] = [
                math.nan if is_dense else value for value, is_dense in zip(values, dense, strict=True)
            ]
    if limit(experiment.moe.moe_expert_capacity_factor) is not None:
        for key in ("moe/would_drop_rate", "moe/per_layer/would_drop_rate"):
            record.pop(key, None)
    return record


def drops_of_evaluation(
    experiment: Experiment, chunks: list[torch.nn.Module], device: torch.device
) -> dict[str, float]:
    """`eval/drop_rate`, where evaluation may drop anything. Collective over all ranks."""
    if experiment.moe is None or limit(experiment.moe.moe_eval_capacity_factor) is None:
        return {}
    total = local_drops(chunks, device)
    dist.all_reduce(total)
    assigned, dropped = total.cpu()
    return {"eval/drop_rate": _ratio(dropped, assigned)}


def _load_max_over_mean(sums: MoESums) -> list[float]:
    return [_ratio(load.max(), load.mean()) for load in sums.load]


def _moe_rows(values: Tensor, sums: MoESums) -> Tensor:
    return values[sums.column("microbatches") > 0]


def _mean_over_layers(sums: MoESums, name: str, per: str) -> float:
    return float((_moe_rows(sums.column(name), sums) / _moe_rows(sums.column(per), sums)).mean())


def _quotients(sums: MoESums, over: str, under: str) -> list[float]:
    return [_ratio(a, b) for a, b in zip(sums.column(over), sums.column(under), strict=True)]


def _mean(values: list[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a) / float(b) if float(b) else math.nan
