"""Rules about ranks: what is spread over them must come out even.

TP, PP, VPP, CP, DP, EP, ETP as in the schema.
"""

from __future__ import annotations

import math

from megatron_moe.config.defaults import divisors_of, nearest_multiples
from megatron_moe.config.layout_string import layers_are_placed, layers_per_stage
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import CP, DP, EP, ETP, PP, SP, TP, VPP, Problems, divides, set_value
from megatron_moe.config.schema import Experiment
from megatron_moe.config.stage_counts import FIRST, LAST

MOST_RANKS = 1_000_000
"""More than any machine has."""


def experts_over_ep(e: Experiment) -> Problems:
    """Each EP rank holds the same number of experts."""
    if e.moe is not None:
        yield from divides(
            "moe.num_moe_experts", e.moe.num_moe_experts, EP, set_value(e.parallel.expert_model_parallel_size)
        )


def expert_ranks_fold(e: Experiment) -> Problems:
    """The experts' ranks ETP x EP are laid over the TP x CP x DP ranks of a stage."""
    p = e.parallel
    dp, ep, etp = map(
        set_value, (p.data_parallel_size, p.expert_model_parallel_size, p.expert_tensor_parallel_size)
    )
    stage_ranks = p.tensor_model_parallel_size * p.context_parallel_size * dp
    if e.moe is not None and stage_ranks % (ep * etp):
        stage = f"the {stage_ranks} ranks of a stage, {TP} times {CP} times {DP}"
        text = f"times {ETP} is {ep * etp}, which does not divide {stage}"
        advice = f"make the product of the first two {divisors_of(stage_ranks)}"
        yield Problem((EP, ETP, TP, CP, DP), text, advice)


def dense_has_no_experts(e: Experiment) -> Problems:
    """Without experts nothing can be spread over expert ranks."""
    sizes = {EP: e.parallel.expert_model_parallel_size, ETP: e.parallel.expert_tensor_parallel_size}
    for key, size in sizes.items():
        if e.moe is None and set_value(size) > 1:
            yield Problem(
                (key, "moe"),
                "needs experts, and there is no section moe",
                "leave it out, or add moe.num_moe_experts",
            )


def moe_with_tp_needs_sp(e: Experiment) -> Problems:
    """Megatron-Core's MoE layer with TP trains right only on a sharded sequence."""
    if e.moe is not None and e.parallel.tensor_model_parallel_size > 1 and not e.parallel.sequence_parallel:
        yield Problem(
            (SP, TP), f"does not go with experts and {TP} above 1", "set it to true, or leave it out"
        )


def ranks_can_be_written_down(e: Experiment) -> Problems:
    """Groups and plans list each rank."""
    p = e.parallel
    sizes = (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size)
    if math.prod(sizes) * set_value(p.data_parallel_size) > MOST_RANKS:
        text = f"times {PP} times {CP} times {DP} is more than {MOST_RANKS:,} ranks"
        yield Problem((TP, PP, CP, DP), text, "use fewer")


def sp_needs_tp(e: Experiment) -> Problems:
    """There is nothing to shard the sequence over."""
    if e.parallel.sequence_parallel and e.parallel.tensor_model_parallel_size == 1:
        yield Problem((SP, TP), f"needs {TP} above 1", "set it to false, or leave it out")


def sequence_over_ranks(e: Experiment) -> Problems:
    """The sequence is cut into 2 x CP pieces, and each CP rank's part over TP under sequence parallelism."""
    p, s = e.parallel, e.training.seq_length
    tp = p.tensor_model_parallel_size if p.sequence_parallel else 1
    cp = p.context_parallel_size
    if cp > 1 and s % (2 * cp):
        text = f"is not divisible by 2 x {CP}"
        yield Problem(("training.seq_length", CP), text, f"use {nearest_multiples(s, 2 * cp * tp)}")
    elif s % (cp * tp):
        over = (CP, TP) if cp > 1 else (TP,)
        text = f"is not divisible by {' times '.join(over)} under {SP}"
        unit = 2 * cp * tp if cp > 1 else tp
        yield Problem(("training.seq_length", *over, SP), text, f"use {nearest_multiples(s, unit)}")


def vpp_needs_pp(e: Experiment) -> Problems:
    """Chunks are interleaved between pipeline ranks."""
    if (
        set_value(e.parallel.virtual_pipeline_model_parallel_size) > 1
        and e.parallel.pipeline_model_parallel_size == 1
    ):
        yield Problem((VPP, PP), f"needs {PP} above 1", "leave it out, or use more pipeline ranks")


def stages_add_up(e: Experiment) -> Problems:
    """Each layer is in exactly one stage; only beside the embedding and beside the loss there may be none."""
    key = "pipeline.layers_per_stage"
    if layers_are_placed(e):
        yield from _stages_can_be_placed(e)
        return
    layers, own = layers_per_stage(e), e.pipeline.mtp_stage
    pp, vpp = (
        e.parallel.pipeline_model_parallel_size,
        set_value(e.parallel.virtual_pipeline_model_parallel_size),
    )
    if len(layers) != pp * vpp:
        text = f"makes the number of stages {len(layers)} and not {pp * vpp}, {PP} times {VPP}"
        advice = f"give it {pp * vpp} that add up to {e.model.num_layers} layers"
        if vpp == 1 and layers:
            advice += f", or set {PP} to {len(layers)}"
        yield Problem((key, PP, VPP), text, advice)
    elif sum(layers) != e.model.num_layers:
        text = f"adds up to {sum(layers)} layers and not to model.num_layers"
        even = [(e.model.num_layers + stage) // len(layers) for stage in range(len(layers))][::-1]
        yield Problem((key, "model.num_layers"), text, f"for example {even}")
    elif empty := [stage for stage in range(1, len(layers) - 1) if not layers[stage] and stage != own]:
        text = f"leaves stage {empty[0] + 1} without a layer, embedding or loss"
        yield Problem((key,), text, "give it at least 1 layer, or use fewer stages")


def counts_agree(e: Experiment) -> Problems:
    """Where layers of the first or last stage are said twice."""
    key, p = "pipeline.layers_per_stage", e.pipeline
    for own, count, place in (
        (FIRST, p.num_layers_in_first_stage, 0),
        (LAST, p.num_layers_in_last_stage, -1),
    ):
        if count is None:
            continue
        if layers_are_placed(e):
            yield Problem((own, key), f"stands beside {key}, which lets the planner say it", "leave one out")
        elif layers_per_stage(e)[place:][:1] != [count]:
            yield Problem((own, key), f"is not what {key} says of this stage", "leave one of the two out")


def _stages_can_be_placed(e: Experiment) -> Problems:
    """The first stage may hold the embedding alone and the last the loss, those between need a layer."""
    pp, vpp = (
        e.parallel.pipeline_model_parallel_size,
        set_value(e.parallel.virtual_pipeline_model_parallel_size),
    )
    least = max(1, pp * vpp - 2)
    if e.model.num_layers < least:
        text = f"is fewer than the {pp * vpp} stages, {PP} times {VPP}, need"
        yield Problem(("model.num_layers", PP, VPP), text, f"use at least {least}, or fewer stages")


def param_gather_needs_grad_reduce(e: Experiment) -> Problems:
    """Megatron-Core starts its gathers where the overlapped reductions end."""
    gather, reduce = "parallel.overlap_param_gather", "parallel.overlap_grad_reduce"
    if e.parallel.overlap_param_gather and not e.parallel.overlap_grad_reduce:
        yield Problem((gather, reduce), f"needs {reduce}", f"set {reduce} to true too, or leave it out")


def batch_over_replicas(e: Experiment) -> Problems:
    """A step is a whole number of microbatches on every replica; the interleaved schedule takes them PP at a
    time."""
    t, dp = e.training, set_value(e.parallel.data_parallel_size)
    at_once = t.micro_batch_size * dp
    keys: tuple[str, ...] = ("training.global_batch_size", "training.micro_batch_size", DP)
    if t.global_batch_size % at_once:
        advice = f"use a global_batch_size of {nearest_multiples(t.global_batch_size, at_once)}"
        yield Problem(keys, f"is not divisible by training.micro_batch_size times {DP}, {at_once}", advice)
        return
    pp, microbatches = e.parallel.pipeline_model_parallel_size, t.global_batch_size // at_once
    if set_value(e.parallel.virtual_pipeline_model_parallel_size) > 1 and microbatches % pp:
        text = f"gives {microbatches} microbatches, which the schedule of {VPP} needs to be divisible by {PP}"
        near = nearest_multiples(t.global_batch_size, at_once * pp)
        yield Problem((keys[0], VPP, PP), text, f"use a global_batch_size of {near}")
