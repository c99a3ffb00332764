"""Rules about how tokens travel to their experts."""

from __future__ import annotations

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import EP, ETP, Problems, set_value
from megatron_moe.config.schema import Experiment

_DISPATCHER = "moe.moe_token_dispatcher_type"
_NODE = "moe.moe_ranks_per_node"
_OVERLAP, _SHARED = "moe.moe_shared_expert_overlap", "moe.moe_shared_expert_intermediate_size"
_OURS = "alltoall, deduplicated, allgather or auto"


def shared_expert_overlap(e: Experiment) -> Problems:
    """Shared experts are computed while tokens travel, by dispatchers of our own."""
    if e.moe is None or not e.moe.moe_shared_expert_overlap:
        return
    if e.moe.moe_shared_expert_intermediate_size is None:
        yield Problem((_OVERLAP, _SHARED), f"has no effect without {_SHARED}", "set that, or leave this out")
    if e.moe.moe_token_dispatcher_type == "flex":
        text = f"does not go with the kernels of {_DISPATCHER}"
        yield Problem((_OVERLAP, _DISPATCHER), text, f"set {_DISPATCHER} to {_OURS}, or leave this out")


def ranks_per_node(e: Experiment) -> Problems:
    """Two levels: several nodes of the same number of ranks, at least 2, and sends that they can be taken
    apart into."""
    if e.moe is None or e.moe.moe_ranks_per_node is None:
        return
    size, together = e.moe.moe_ranks_per_node, _expert_ranks(e)
    if e.moe.moe_token_dispatcher_type in ("allgather", "flex"):
        text = f"takes an all-to-all apart, which {_DISPATCHER} is not"
        advice = f"set {_DISPATCHER} to alltoall, deduplicated or auto, or leave this out"
        yield Problem((_NODE, _DISPATCHER), text, advice)
    keys, product = (_NODE, EP, ETP), f"{EP} times {ETP}, {together} ranks,"
    fitting = [count for count in range(2, min(together, 1025)) if together % count == 0]
    choices = " or ".join(map(str, fitting[:4]))
    if together <= size:
        text = f"has no effect where {product} fit into one node"
        yield Problem(keys, text, "leave it out, or spread the experts over more ranks")
    elif size not in fitting:
        text = "is one rank" if size == 1 else f"does not divide {product} into nodes"
        yield Problem(keys, text, f"use {choices}, or leave it out" if fitting else "leave it out")


def sorted_in_a_kernel(e: Experiment) -> Problems:
    """Transformer Engine's kernel sorts tokens for Megatron-Core's own layer."""
    if e.moe is None or not e.moe.moe_permute_fusion or e.moe.overlap_moe_expert_parallel_comm:
        return
    if e.moe.moe_token_dispatcher_type != "flex":
        keys = ("moe.moe_permute_fusion", _DISPATCHER, "moe.overlap_moe_expert_parallel_comm")
        text = f"has no effect but with flex in {_DISPATCHER}, or {keys[2]}"
        yield Problem(keys, text, "leave it out, or set one of these")


def _expert_ranks(e: Experiment) -> int:
    """Ranks that together hold each expert once."""
    p = e.parallel
    return set_value(p.expert_model_parallel_size) * set_value(p.expert_tensor_parallel_size)
