"""The process groups that a MoE layer talks over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MoEGroups:
    """Process groups; None stands for this rank alone.

    Attributes:
        tensor: TP, whose ranks hold parts of the sequence one after the other (sequence parallelism).
        context: CP, whose ranks hold zig-zag chunks of each sequence.
        microbatch: TP x CP, TP counted first: the ranks that share a microbatch.
        expert: EP, whose ranks hold different experts.
        expert_tensor: ETP, whose ranks hold parts of each expert.
        expert_ranks: ETP x EP, ETP counted first: all ranks that together hold each expert once.
        expert_data: ranks that hold the same experts; None where gradients are averaged by others.
        replicated_tokens: the ranks of `tensor` hold the same tokens and not parts (no sequence parallelism).
    """

    tensor: Any = None
    context: Any = None
    microbatch: Any = None
    expert: Any = None
    expert_tensor: Any = None
    expert_ranks: Any = None
    expert_data: Any = None
    replicated_tokens: bool = False


def of_megatron(collection: Any, sequence_parallel: bool) -> MoEGroups:
    """From Megatron-Core's ProcessGroupCollection."""
    tensor, context = collection.tp, collection.cp
    return MoEGroups(
        tensor=tensor,
        context=context,
        microbatch=collection.tp_cp if sequence_parallel else context,
        expert=collection.ep,
        expert_tensor=collection.expt_tp,
        expert_ranks=collection.tp_ep,
        expert_data=collection.expt_dp,
        replicated_tokens=tensor.size() > 1 and not sequence_parallel,
    )


def size(group: Any) -> int:
    """Ranks of a group."""
    return 1 if group is None else int(group.size())


def rank(group: Any) -> int:
    """This rank's place in a group."""
    return 0 if group is None else int(group.rank())
