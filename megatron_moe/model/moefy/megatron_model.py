"""A mixture in the place of Megatron-Core's MLP."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.model.moe.attached import megatron_scale
from megatron_moe.model.moe.experts import Experts
from megatron_moe.model.moe.groups import size
from megatron_moe.model.moe.layer import MixtureOfExperts


class MegatronMixture(MixtureOfExperts):
    """[s, b, h] -> [s, b, h] and no bias; its losses have the scale of Megatron-Core's schedule."""

    def __init__(self, hidden_size: int, **arguments: Any) -> None:
        super().__init__(hidden_size, batch_first=False, **arguments)
        self.router.loss_scale = megatron_scale
        for parameter in self.experts.parameters():
            parameter.allreduce = size(self.groups.expert) == 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor, *further: Any, **options: Any) -> Any:
        """The layer passes no padding mask on to dense layers: see `iteration.telling`."""
        return super().forward(x), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Where this rank's weights lie in the whole model's."""
        from megatron.core.transformer.utils import sharded_state_dict_default

        shards: dict[str, Any] = {}
        for name, child in self.named_children():
            if name == "experts" and isinstance(child, Experts):
                shards |= child.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
            elif name == "experts" and size(self.groups.expert) > 1:
                raise InputError(
                    "experts that are modules of their own cannot be saved while they are spread over ranks; "
                    "use feed-forward layers of a known form, or process_group=None"
                )
            else:
                shards |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata)
        return shards


def groups_of(mlp: Any, name: str, process_group: Any) -> dict[str, Any]:
    """Arguments for the mixture in the place of an MLP of Megatron-Core."""
    if size(getattr(mlp, "tp_group", None)) > 1:
        raise InputError(
            f"{name}: is split over {size(mlp.tp_group)} tensor-parallel ranks, and can't be made a mixture "
            "as it is; use tensor_model_parallel_size 1, or train from a YAML file with a section moe"
        )
    from megatron.core import parallel_state

    found = {"process_group": process_group}
    if parallel_state.model_parallel_is_initialized():
        found["expert_data_group"] = parallel_state.get_expert_data_parallel_group()
        of_megatron = parallel_state.get_expert_model_parallel_group()
        here = dist.get_process_group_ranks(of_megatron)
        wanted = here[:1] if process_group is None else dist.get_process_group_ranks(process_group)
        if len(here) != len(wanted) or (process_group is not None and here != wanted):
            raise InputError(
                f"process_group: has {len(wanted)} ranks, and Megatron-Core's expert-parallel group has "
                f"{len(here)}; "
                "pass that (parallel_state.get_expert_model_parallel_group()), by which it reduces gradients"
            )
    return found
