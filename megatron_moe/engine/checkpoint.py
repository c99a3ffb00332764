"""Sharded checkpoints through Megatron-Core's dist_checkpointing (torch_dist): what a rank holds, saved and
loaded in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from megatron_moe.engine import overlap
from megatron_moe.engine.groups import gloo_beside_nccl
from megatron_moe.engine.versions import write_checkpoints_in_process

METADATA = {
    # Optimizer state is saved a parameter, in the model's global shapes, so that any layout can load it.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def save(folder: Path, chunks: list[torch.nn.Module], optimizer: Any, common: dict[str, Any]) -> None:
    """Write model, optimizer and random states of all ranks into `folder`, which must be there and empty. A
    collective.

    Args:
        chunks: wrapped model chunks of this rank.
        common: small values that are equal on all ranks.
    """
    from megatron.core import dist_checkpointing

    _begin_moments(optimizer)
    state = _model_state(chunks)
    model = dict(state)
    state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata())
    state["rng"] = _random_states_object()
    state["common"] = common
    dist_checkpointing.save(state, str(folder), _save_strategy(), content_metadata=METADATA)


def _begin_moments(optimizer: Any) -> None:
    """Give the optimizer the moments that its first update would start from. Where every step so far was
    skipped it has none, and Megatron-Core's checkpoint fails with KeyError 'exp_avg' (0.16.1, 0.19.2)."""
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer and not part.optimizer.state and part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
            for group in part.optimizer.param_groups:
                group.setdefault("step", 0)


def load(folder: Path, chunks: list[torch.nn.Module], optimizer: Any, with_rng: bool) -> dict[str, Any]:
    """Read what `save` wrote into this rank's model and optimizer; the layout may be another one. A
    collective.

    Args:
        with_rng: also the random states; only where layout and number of ranks are those of the save.

    Returns:
        The `common` values. Raises KeyError naming the weights that the checkpoint lacks.
    """
    from megatron.core import dist_checkpointing

    state = _model_state(chunks)
    model = dict(state)
    check_names(folder, model)
    state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata())
    if with_rng:
        state["rng"] = _random_states_object()
    loaded = dist_checkpointing.load(state, str(folder))
    _load_model_state(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    if with_rng:
        _set_random_states(loaded["rng"])
    common: dict[str, Any] = loaded["common"]
    return common


def save_weights(folder: Path, chunks: list[torch.nn.Module]) -> None:
    """Write only the model's weights. A collective."""
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(_model_state(chunks), str(folder), _save_strategy())


def load_weights(folder: Path, chunks: list[torch.nn.Module]) -> None:
    """Read only the model's weights, in any layout. A collective."""
    from megatron.core import dist_checkpointing

    state = _model_state(chunks)
    check_names(folder, state)
    _load_model_state(chunks, dist_checkpointing.load(state, str(folder)))


def check_names(folder: Path, state: dict[str, Any]) -> None:
    """Raise KeyError naming every tensor of `state` that the checkpoint in `folder` lacks."""
    # Megatron-Core's load_tensors_metadata fails with torch 2.15 (unknown property `strides`).
    there = set(FileSystemReader(str(folder)).read_metadata().state_dict_metadata)
    missing = sorted(set(_tensor_keys(state)) - there)
    if missing:
        raise KeyError(f"{folder} lacks {len(missing)} tensors of this model: {', '.join(missing)}")


def sharded_weights(chunks: list[torch.nn.Module]) -> list[Any]:
    """Every ShardedTensor of this rank's model chunks, gate and up-projection apart. A collective."""
    return list(sharded_tensors(_model_state(chunks)))


def object_keys(chunks: list[torch.nn.Module]) -> list[str]:
    """What this rank's model chunks save beside tensors, under the keys that their files have. A
    collective."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = _model_state(chunks)
    return [value.unique_key for value in nested_values(state) if isinstance(value, ShardedObject)]


def sharded_gradients(chunks: list[torch.nn.Module]) -> list[Any]:
    """As `sharded_weights`, with the gradient in `main_grad` where the weight was; what has none, or is
    frozen, is left out."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor

    found: list[Any] = []
    for name, model in _named(chunks):
        gradients: dict[int, Any] = {
            id(weight): weight.main_grad  # type: ignore[attr-defined]
            for weight in model.parameters()
            if weight.requires_grad
        }
        state = model.sharded_state_dict(metadata=metadata())  # type: ignore[operator]
        for value in nested_values(state):
            if isinstance(value, ShardedBase) and id(value.data) in gradients:
                value.data = gradients[id(value.data)]
                if isinstance(value, ShardedTensor):
                    value.dtype = value.data.dtype
                found += sharded_tensors({name: value})
    return found


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside the data-parallel and the mixed-precision wrapper."""
    while hasattr(chunk, "module"):
        chunk = cast("torch.nn.Module", chunk.module)
    return chunk


def _named(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Chunks with the names that Megatron-Core's checkpoints give them."""
    if len(chunks) == 1:
        return [("model", unwrap(chunks[0]))]
    return [(f"model{index}", unwrap(chunk)) for index, chunk in enumerate(chunks)]


def _model_state(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    overlap.complete_weights(chunks)
    return {name: model.sharded_state_dict(metadata=metadata()) for name, model in _named(chunks)}  # type: ignore[operator]


def _load_model_state(chunks: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for name, model in _named(chunks):
        model.load_state_dict(loaded[name])


def metadata() -> dict[str, Any]:
    """How tensors are laid out, as Megatron-Core's `sharded_state_dict` wants to be told."""
    from megatron.core import parallel_state

    return {
        **METADATA,
        "distrib_optim_fully_reshardable_mem_efficient": gloo_beside_nccl(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _save_strategy() -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    write_checkpoints_in_process()
    return TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)


def _tensor_keys(state: dict[str, Any]) -> list[str]:
    return [tensor.key for tensor in sharded_tensors(state)]


def sharded_tensors(state: dict[str, Any]) -> list[Any]:
    """Every ShardedTensor in a state, factories' tensors among them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = []
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            value = value.build()
        found += [part for part in nested_values({"": value}) if isinstance(part, ShardedTensor)]
    return found


def _random_states_object() -> Any:
    """This rank's random states: dropout, and whatever else draws in training."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = {
        "host": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng_state", states, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _set_random_states(states: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    torch.set_rng_state(states["host"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
