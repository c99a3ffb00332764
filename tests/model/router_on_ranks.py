"""Run on ranks: the router under a layout, on one microbatch that is the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.model.moe.groups import of_megatron
from megatron_moe.model.moe.router import Router
from megatron_moe.plan import plan as plans


def build(experiment: Experiment) -> Router:
    """A router whose weights are the same on every rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    plan = plans.make(experiment)
    groups.initialize_model_parallel(plan.layout, seed=1, timeout_s=60)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    assert experiment.moe is not None
    router = Router(
        experiment.moe,
        experiment.model.hidden_size,
        of_megatron(collection, bool(experiment.parallel.sequence_parallel)),
        seed=experiment.training.seed,
    )
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(4)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return router


def route(
    experiment: Experiment, hidden: Tensor, padding: Tensor | None, whole_mask: bool
) -> dict[str, Tensor]:
    """Gate weights, kept assignments and the gradient of the input, all tokens in one process's order; the
    weights' gradients, one under the other; the row of statistics; the balancing losses' values: summed over
    the ranks, of the last the mean.

    Args:
        hidden: [s, b, h] of all tokens.
        padding: [b, s] of all tokens, true where padding.
        whole_mask: give the mask of all tensor-parallel ranks, as later pipeline stages get it.
    """
    router = build(experiment)
    places = torch.arange(len(hidden))
    cp, tp = router.groups.context, router.groups.tensor
    if cp.size() > 1:
        chunks = places.chunk(2 * cp.size())
        places = torch.cat([chunks[cp.rank()], chunks[2 * cp.size() - 1 - cp.rank()]])
    of_tensor_group, places = places, places.chunk(tp.size())[tp.rank()]
    mask = None if padding is None else padding.T[of_tensor_group if whole_mask else places]
    mine = hidden[places].clone().requires_grad_()
    probs, kept = router(mine, mask).dense(router.moe.num_moe_experts)
    upstream = torch.randn(*hidden.shape[:2], probs.size(-1), generator=torch.Generator().manual_seed(8))
    if probs.requires_grad:
        (probs * upstream[places].flatten(0, 1)).sum().backward()

    shape = (len(hidden), hidden.size(1), -1)
    result = {
        "statistics": router.statistics.take(),
        # Every rank has the whole value.
        "losses": router.balancing.take_values() / torch.distributed.get_world_size(),
        "probs": _spread(probs.detach(), places, shape),
        "kept": _spread(kept.float(), places, shape),
    }
    if weights := list(router.parameters()):
        result["weight"] = torch.cat([weight.grad for weight in weights])
        result["input"] = _spread(mine.grad.flatten(0, 1), places, shape)
    for value in result.values():
        torch.distributed.all_reduce(value)
    return result


def _spread(rows: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[s, b, ..] with this rank's rows at their places, zeros elsewhere."""
    whole = torch.zeros(shape[0], shape[1], rows.size(-1))
    whole[places] = rows.view(len(places), shape[1], -1)
    return whole


def recorded(experiment: Experiment, hidden: Tensor) -> list[int]:
    """Microbatches counted after a plain pass, one that is recomputed, one without gradients, and one in
    evaluation."""
    from megatron.core import tensor_parallel

    router = build(experiment)
    counts = []
    router(hidden.clone().requires_grad_())
    counts.append(len(router.statistics.rows))
    tensor_parallel.checkpoint(
        lambda x: router(x).weights, False, hidden.clone().requires_grad_()
    ).sum().backward()
    counts.append(len(router.statistics.rows))
    with torch.no_grad():
        router(hidden)
    counts.append(len(router.statistics.rows))
    router.eval()
    router(hidden)
    counts.append(len(router.statistics.rows))
    return counts
