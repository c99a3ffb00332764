"""Where vectors that tensor-parallel ranks share lie in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch


def split_vectors(
    module: torch.nn.Module,
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
    tensor_group: Any,
) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of a module whose parameters are all cut along their first
    dimension.

    Args: as those of `sharded_state_dict` of its modules; and
        tensor_group: the tensor-parallel group.
    """
    from megatron.core.transformer.utils import (
        ensure_metadata_has_dp_cp_group,
        make_sharded_tensors_for_checkpoint,
    )

    state = module.state_dict(prefix="", keep_vars=True)
    shards: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        state,
        prefix,
        dict.fromkeys(state, 0),
        sharded_offsets,
        tp_group=tensor_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
    return shards
