"""Rules about communication of experts that runs under computation, and about copies of hot experts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import EP, ETP, PP, VPP, Problems, set_value
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE

_DEGREE, _BATCHES = "moe.moe_overlap_degree", "moe.overlap_moe_expert_parallel_comm"
_SHADOWING, _DISPATCHER = "moe.moe_shadowing", "moe.moe_token_dispatcher_type"
_SPEC = "model.spec"
_DRAWING_GATES = ("noisy_topk", "gshard", "hash", "forced_balance")
"""Those that look at more of a token than its hidden state."""


def overlap_degree(e: Experiment) -> Problems:
    """Parts of an all-to-all: there is one, it is ours, and so are the experts."""
    if e.moe is None or e.moe.moe_overlap_degree == 1:
        return
    yield from _needs_our_alltoall(e, e.moe, _DEGREE, "takes the all-to-all apart")
    if _expert_ranks(e) == 1:
        text = f"has no effect where {EP} and {ETP} are 1: no token travels"
        yield Problem((_DEGREE, EP, ETP), text, "leave it out, or spread the experts over ranks")


def shadowing(e: Experiment) -> Problems:
    """Copies of experts: there are ranks without, each holds whole ones of ours, and not all are copied."""
    if e.moe is None or e.moe.moe_shadowing is None:
        return
    yield from _needs_our_alltoall(e, e.moe, _SHADOWING, "keeps tokens from the all-to-all")
    if set_value(e.parallel.expert_model_parallel_size) == 1:
        text = f"has no effect where {EP} is 1: every rank has all experts"
        yield Problem((_SHADOWING, EP), text, "leave it out, or spread the experts over ranks")
    if set_value(e.parallel.expert_tensor_parallel_size) > 1:
        text = f"copies whole experts, which no rank has with {ETP}"
        yield Problem((_SHADOWING, ETP), text, f"set {ETP} to 1, or leave this out")
    if e.moe.moe_pad_expert_input_to_capacity:
        padded = "moe.moe_pad_expert_input_to_capacity"
        yield Problem(
            (_SHADOWING, padded),
            f"does not go with {padded}: copies compute what they get",
            "keep one of the two",
        )
    maximum, experts = f"{_SHADOWING}.maximum", "moe.num_moe_experts"
    if e.moe.moe_shadowing.maximum >= e.moe.num_moe_experts:
        text, most = f"is not below {experts}", e.moe.num_moe_experts - 1
        yield Problem((maximum, experts), text, f"use at most {most}" if most else "leave out moe_shadowing")


def overlapped_batches(e: Experiment) -> Problems:
    """What Megatron-Core's schedule for two microbatches at once asks for, and what its MoE layer does not
    do."""
    moe = e.moe
    if moe is None or not moe.overlap_moe_expert_parallel_comm:
        return
    if set_value(e.parallel.expert_model_parallel_size) == 1:
        text = f"needs {EP} above 1"
        yield Problem((_BATCHES, EP), text, "leave it out, or spread the experts over ranks")
    if e.training.precision == "fp32":
        keys = (_BATCHES, "training.precision")
        yield Problem(keys, f"does not work with {keys[1]}", f"set {keys[1]} to bf16, or leave it out")
    pipelined = e.parallel.pipeline_model_parallel_size > 1
    if pipelined and set_value(e.parallel.virtual_pipeline_model_parallel_size) == 1:
        text = f"needs {VPP} above 1 where {PP} is"
        yield Problem((_BATCHES, PP, VPP), text, f"set {VPP} to 2, or leave it out")
    if moe.moe_token_dispatcher_type not in ("alltoall", "flex"):
        text = f"does not go with {_DISPATCHER}"
        yield Problem((_BATCHES, _DISPATCHER), text, f"set {_DISPATCHER} to alltoall, or leave it out")
    for key, why in _not_beside_batches(e, moe):
        yield Problem((_BATCHES, key), f"does not go with {key}: {why}", "leave one of the two out")


def _not_beside_batches(e: Experiment, moe: MoE) -> Iterator[tuple[str, str]]:
    """Keys that are set and do not go with Megatron-Core's schedule, and why."""
    layer = "it needs Megatron-Core's own MoE layer"
    if any(set_value(e.recompute.layers_per_stage)):
        yield "recompute.layers_per_stage", "what is computed again cannot be taken apart"
    if "moe" in set_value(e.recompute.modules):
        yield "recompute.modules", "the layer is taken apart, so that it cannot be computed again as one"
    if moe.moe_shared_expert_overlap:
        yield "moe.moe_shared_expert_overlap", "Megatron-Core refuses both"
    if moe.moe_overlap_degree > 1:
        yield _DEGREE, layer
    if moe.moe_shadowing is not None:
        yield _SHADOWING, layer
    if moe.moe_ranks_per_node is not None:
        yield "moe.moe_ranks_per_node", layer
    if moe.moe_pad_expert_input_to_capacity:
        yield "moe.moe_pad_expert_input_to_capacity", layer
    if moe.moe_router_gate in _DRAWING_GATES:
        yield "moe.moe_router_gate", "the schedule hands routers nothing but hidden states"
    elif moe.moe_input_jitter_eps:
        yield "moe.moe_input_jitter_eps", "the schedule hands routers nothing but hidden states"


def _needs_our_alltoall(e: Experiment, moe: MoE, key: str, what: str) -> Problems:
    if moe.moe_token_dispatcher_type != "alltoall":
        text = f"{what}, which {_DISPATCHER} is not"
        yield Problem((key, _DISPATCHER), text, f"set {_DISPATCHER} to alltoall, or leave this out")
    if e.model.spec != "native":
        text = f"does not go with the experts of {_SPEC}, which are computed all at once"
        yield Problem((key, _SPEC), text, f"set {_SPEC} to native, or leave this out")


def _expert_ranks(e: Experiment) -> int:
    p = e.parallel
    return set_value(p.expert_model_parallel_size) * set_value(p.expert_tensor_parallel_size)
