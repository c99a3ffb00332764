"""Run on ranks: models made mixtures under expert parallelism, and Megatron-Core's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_moe
from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan as plans

WIDTH = 16


def encoder(dropout: float = 0.0) -> nn.TransformerEncoder:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def data(rank: int) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(rank))


def trained(model: nn.Module, ranks: range, average: bool) -> list[Tensor]:
    """Outputs of two steps on the tokens of these ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        for rank in ranks:
            output = model(data(rank))
            (output.square().mean() / len(ranks)).backward()
            outputs.append(output.detach())
        if average:
            megatron_moe.average_gradients(model)
        megatron_moe.end_iteration(model)
        optimizer.step()
    return outputs


def expert_parallel() -> list[Tensor]:
    model = megatron_moe.moefy(encoder(), 4, moe_aux_loss_coeff=0.0, **megatron_moe.expert_groups(2))
    return trained(model, range(dist.get_rank(), dist.get_rank() + 1), average=True)


def of_megatron(experiment: Experiment, size: int) -> dict[str, Any]:
    """A dense GPT of Megatron-Core before and after, and what of it stands in a checkpoint."""
    from megatron.core import parallel_state

    plan = plans.make(experiment)
    spread = replace(plan.layout, expert_model_parallel_size=size)
    groups.initialize_model_parallel(spread, seed=1, timeout_s=60)
    (model,) = build_chunks(experiment, plan, torch.float32)
    tokens = torch.arange(24).view(2, 12)
    positions = torch.arange(12).expand_as(tokens)
    before = model(tokens, positions, None).detach()
    group = parallel_state.get_expert_model_parallel_group() if size > 1 else None
    megatron_moe.moefy(model, 4, process_group=group, moe_aux_loss_coeff=0.0)
    after = model(tokens, positions, None)
    after.square().mean().backward()
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    shards = model.sharded_state_dict(metadata=metadata)
    return {
        "names": list(megatron_moe.mixtures(model)),
        "difference": float((after - before).abs().max()),
        "without_gradient": [name for name, p in model.named_parameters() if p.grad is None],
        "saved": sorted(key for key in shards if ".mlp." in key),
        "held": sorted(f"decoder.{name}" for name, _ in model.decoder.named_parameters() if ".mlp." in name),
    }


def split_over_tensor_ranks(experiment: Experiment) -> str:
    """What is said of a model whose layers are split."""
    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, seed=1, timeout_s=60)
    (model,) = build_chunks(experiment, plan, torch.float32)
    try:
        megatron_moe.moefy(model, 4)
    except megatron_moe.InputError as error:
        return str(error)
    return "nothing"
