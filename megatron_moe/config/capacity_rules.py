"""Rules about the capacity of experts."""

from __future__ import annotations

from megatron_moe.config.capacity_factor import limit
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import EP, Problems, set_value
from megatron_moe.config.schema import Experiment

_FACTOR = "moe.moe_expert_capacity_factor"
_PADDED = "moe.moe_pad_expert_input_to_capacity"


def capacity_that_is_used(e: Experiment) -> Problems:
    """What says how experts of limited capacity do, where theirs has no limit, and the other way round."""
    moe = e.moe
    if moe is None:
        return
    in_training, in_evaluation = limit(moe.moe_expert_capacity_factor), limit(moe.moe_eval_capacity_factor)
    policy, would_drop = "moe.moe_token_drop_policy", "moe.moe_would_drop_capacity_factor"
    if moe.moe_token_drop_policy != "probs" and in_training is None and in_evaluation is None:
        text = f"has no effect where nothing is dropped: {_FACTOR} sets no limit"
        yield Problem((policy, _FACTOR), text, f"set {_FACTOR} to 1.25, or leave {policy} out")
    if moe.moe_pad_expert_input_to_capacity and moe.moe_expert_capacity_factor is None:
        yield Problem((_PADDED, _FACTOR), f"needs {_FACTOR}", "set that to 1.25, or to auto")
    if moe.moe_would_drop_capacity_factor != 1.0 and in_training is not None:
        text = f"has no effect where {_FACTOR} drops: moe/drop_rate says how much"
        yield Problem((would_drop, _FACTOR), text, f"leave {would_drop} out")


def padded_experts(e: Experiment) -> Problems:
    """An expert that is computed in parts would be filled up in each, and Megatron-Core's own layer does not
    fill up as ours does."""
    moe, degree, dispatcher = e.moe, "moe.moe_overlap_degree", "moe.moe_token_dispatcher_type"
    if moe is None or not moe.moe_pad_expert_input_to_capacity:
        return
    of_megatron = {
        dispatcher: moe.moe_token_dispatcher_type == "flex",
        "moe.overlap_moe_expert_parallel_comm": moe.overlap_moe_expert_parallel_comm,
    }
    for key, is_set in of_megatron.items():
        if is_set:
            text = f"does not go with {key}, under which the layer is Megatron-Core's"
            yield Problem((_PADDED, key), text, f"leave {_PADDED} out, or {key}")
    local = moe.num_moe_experts // set_value(e.parallel.expert_model_parallel_size)
    if moe.moe_overlap_degree > max(local, 1):
        text = f"cuts experts in parts, each of which {_PADDED} would fill up"
        yield Problem((degree, _PADDED, EP), text, f"use at most {local}, the experts of a rank")
