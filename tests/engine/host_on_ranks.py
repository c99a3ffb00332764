"""Run on ranks: what the stand-ins do once they are installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.engine import groups, host
from megatron_moe.plan.layout import Layout

LAYOUT = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
}


def installed_again() -> list[str]:
    """The targets that a second installation changed; then whether the first one is in place."""
    before = [_value(stand_in.target) for stand_in in host.STAND_INS]
    host.install()
    after = [_value(stand_in.target) for stand_in in host.STAND_INS]
    changed = [s.target for s, b, a in zip(host.STAND_INS, before, after, strict=True) if b is not a]
    assert host.is_installed()
    return changed


def _value(target: str) -> Any:
    holder, name = host._resolve(target)
    return getattr(holder, name)


def draws(tp: int, dp: int, seed: int) -> dict[str, list[float]]:
    """What this rank draws: from the default state, from the tensor-parallel state twice, from the default
    state again; and from the default state where nothing was drawn in between."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    sizes = {**LAYOUT, "tensor_model_parallel_size": tp, "data_parallel_size": dp}
    groups.initialize_model_parallel(Layout(**sizes), seed, timeout_s=60)
    start = torch.cuda.get_rng_state()
    result = {"default": torch.rand(3).tolist()}
    for name in ("fork", "next fork"):
        with get_cuda_rng_tracker().fork():
            result[name] = torch.rand(3).tolist()
    result["default after"] = torch.rand(3).tolist()
    torch.cuda.set_rng_state(start)
    torch.rand(3)
    result["default without forks"] = torch.rand(3).tolist()
    return result


def sizes_differ(rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gather of parts of different length and its gradient, reduce-scatter into such parts and its
    gradient."""
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    part = _numbers(rows[rank], 10 * (rank + 1)).requires_grad_()
    gathered = gather_from_sequence_parallel_region(part, group=group, output_split_sizes=rows)
    gathered.backward(_numbers(sum(rows), 100 * (rank + 1)))
    whole = _numbers(sum(rows), 1000 * (rank + 1)).requires_grad_()
    scattered = reduce_scatter_to_sequence_parallel_region(whole, group=group, input_split_sizes=rows)
    scattered.backward(_numbers(rows[rank], 10 * (rank + 1)))
    assert part.grad is not None and whole.grad is not None
    return gathered.detach(), part.grad, scattered.detach(), whole.grad


def _numbers(rows: int, start: int) -> Tensor:
    return (start + torch.arange(rows * 2, dtype=torch.float32)).view(rows, 2)
