"""Attention whose heads the tensor-parallel ranks cannot share evenly, for inference.

Megatron-Core refuses such a number of heads. Here each rank's attention believes that all ranks have as many
as this one: all that it computes is of its own heads, but for one sum over the ranks, which asks nobody how
many heads they have. Key and value heads are dealt out whole, with the queries that read them, by divmod: the
first ranks have one more.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch

from megatron_moe.config.schema import Experiment
from megatron_moe.model.norms import NormOfAllHeads
from megatron_moe.plan.inference import dealt


def are_uneven(experiment: Experiment) -> bool:
    """Whether ranks have different numbers of key and value heads."""
    groups, ranks = experiment.model.num_query_groups, experiment.parallel.tensor_model_parallel_size
    assert groups is not None
    return groups >= ranks and groups % ranks > 0


def of_even_heads(experiment: Experiment) -> dict[str, int]:
    """Fields of a TransformerConfig that Megatron-Core's checks pass, with no fewer heads than there are."""
    model, ranks = experiment.model, experiment.parallel.tensor_model_parallel_size
    groups = model.num_query_groups
    assert groups is not None
    padded = -(-groups // ranks) * ranks
    return {
        "num_attention_heads": model.num_attention_heads // groups * padded,
        "num_query_groups": padded,
    }


@cache
def uneven(attention: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A class of self-attention with this rank's share of uneven heads."""

    class Attention(attention):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
            ranks = pg_collection.tp.size()
            self.all_groups = config.num_query_groups
            self.first, self.count = list(dealt(self.all_groups, ranks))[pg_collection.tp.rank()]
            own = copy.copy(config)
            own.num_query_groups = self.count * ranks
            own.num_attention_heads = config.num_attention_heads // self.all_groups * own.num_query_groups
            super().__init__(own, *args, pg_collection=pg_collection, **kwargs)
            for norm in self.modules():
                if isinstance(norm, NormOfAllHeads):
                    norm.width = norm.width * self.all_groups // own.num_query_groups

        def sharded_state_dict(
            self,
            prefix: str = "",
            sharded_offsets: tuple[Any, ...] = (),
            metadata: dict[str, Any] | None = None,
        ) -> dict[str, Any]:
            """Where this rank's weights lie among those of all heads. To be filled from, not to be saved:
            Megatron-Core's files hold equal parts."""
            shards: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            for name, parameter in self.named_parameters():
                if not getattr(parameter, "tensor_model_parallel", False):
                    continue
                shard, dim = shards[prefix + name], parameter.partition_dim
                each, axis = parameter.size(dim) // self.count, shard.prepend_axis_num + dim
                shard.global_shape = _with(shard.global_shape, axis, each * self.all_groups)
                shard.global_offset = _with(shard.global_offset, axis, each * self.first)
            return shards

    Attention.__name__, Attention.__qualname__ = attention.__name__, attention.__qualname__
    return Attention


def _with(numbers: tuple[int, ...], axis: int, number: int) -> tuple[int, ...]:
    return (*numbers[:axis], number, *numbers[axis + 1 :])
