"""Run on ranks: the gradients of balancing losses alone, of our router and of Megatron-Core's."""

from __future__ import annotations

from typing import Any

import torch
from router_on_ranks import build
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.model.transformer_config import transformer_config
from megatron_moe.plan import plan as plans

LOAD = torch.tensor([9.0, 1.0, 4.0, 2.0])
"""Of the previous global batch."""


def of_ours(experiment: Experiment, hidden: Tensor, padding: Tensor | None, cut: int) -> Tensor:
    """The weight's gradient of the loss over a global batch, in its second iteration.

    Args:
        hidden: [s, b, h]. padding: [b, s].
        cut: microbatches of equally many sequences that the batch is cut into.
    """
    router = build(experiment)
    router.end_iteration(LOAD, None)
    router.loss_scale = lambda: 1 / cut
    valid = hidden[..., 0].numel() if padding is None else int((~padding).sum())
    router.balancing.mean_tokens = torch.tensor(valid / cut)
    return _gradient(router, hidden, padding, cut)


def of_megatron(
    experiment: Experiment, name: str, hidden: Tensor, padding: Tensor | None, cut: int
) -> Tensor:
    """The same of Megatron-Core's router; its loss over the global batch knows no previous one."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_moe.engine.versions import repair_missing_transformer_engine

    repair_missing_transformer_engine()
    ours = build(experiment)
    config: Any = transformer_config(experiment, plans.make(experiment), 0, torch.float32)
    config.moe_router_load_balancing_type, config.moe_aux_loss_coeff = name, 1.0
    config.moe_router_dtype = "fp32"
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    router.weight.data = ours.weight.data.clone()
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1 / cut))
    return _gradient(router, hidden, padding, cut)


def _gradient(router: Any, hidden: Tensor, padding: Tensor | None, cut: int) -> Tensor:
    """Gate weights are multiplied by 0: only what is attached to them is left."""
    masks = [None] * cut if padding is None else padding.T.chunk(cut, dim=1)
    for part, mask in zip(hidden.chunk(cut, dim=1), masks, strict=True):
        routed = router(part.contiguous(), mask)
        weights = routed[0] if isinstance(routed, tuple) else routed.weights
        (weights * 0).sum().backward()
    gradient: Tensor = router.weight.grad
    return gradient


def recorded(experiment: Experiment, hidden: Tensor) -> list[int]:
    """Microbatches whose losses are counted after a plain pass, one that is recomputed, one without
    gradients, and one in evaluation."""
    from megatron.core import tensor_parallel

    router = build(experiment)
    counts = []
    router(hidden.clone().requires_grad_())
    counts.append(len(router.balancing.values))
    again = hidden.clone().requires_grad_()
    tensor_parallel.checkpoint(lambda x: router(x).weights, False, again).sum().backward()
    counts.append(len(router.balancing.values))
    with torch.no_grad():
        router(hidden)
    counts.append(len(router.balancing.values))
    router.eval()
    router(hidden)
    counts.append(len(router.balancing.values))
    return counts
