"""What routers are told before an iteration, and how they go on to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_moe.config.capacity_factor import limit
from megatron_moe.config.schema import Experiment
from megatron_moe.model.moe.balancing import OF_GLOBAL_BATCH, losses_of
from megatron_moe.training.moe_sums import MoESums, routers_of


def begin_iteration(
    experiment: Experiment, chunks: list[torch.nn.Module], microbatches: Sequence[Mapping[str, Tensor]]
) -> None:
    """Tell the routers how many valid tokens the microbatches of the coming global batch have, in the mean,
    where a loss over the global batch asks for it. Then a collective over the replicas of each stage.

    Args:
        microbatches: this replica's, of which a context-parallel rank has a part.
    """
    if experiment.moe is None or OF_GLOBAL_BATCH not in losses_of(experiment.moe):
        return
    from megatron.core import parallel_state

    tokens = torch.stack([_valid_tokens(batch) for batch in microbatches]).sum()
    torch.distributed.all_reduce(
        tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    count = len(microbatches) * parallel_state.get_data_parallel_world_size()
    mean = (tokens.double() / count).clamp(min=1.0).float()
    for chunk in chunks:
        for router in routers_of(chunk):
            router.balancing.mean_tokens = mean


def end_iteration(experiment: Experiment, chunks: list[torch.nn.Module], sums: MoESums) -> None:
    """Move the coefficients and expert biases of this rank's routers, after an update of the weights.

    Args:
        sums: over the global batch, the same on all ranks.
    """
    assert experiment.moe is not None
    drops = limit(experiment.moe.moe_expert_capacity_factor) is not None
    dropped, assigned = sums.column("dropped" if drops else "would_drop"), sums.column("assigned")
    for chunk in chunks:
        for router in routers_of(chunk):
            layer = router.layer_number - 1
            routed = float(assigned[layer])
            drop_rate = float(dropped[layer]) / routed if routed else None
            router.end_iteration(sums.load[layer], drop_rate)


def _valid_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """[] int64."""
    if "padding_mask" in batch:
        return (~batch["padding_mask"]).sum()
    tokens = batch["tokens"]
    return torch.tensor(tokens.numel(), device=tokens.device)
