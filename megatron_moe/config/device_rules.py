"""Rules about keys for GPUs and Transformer Engine, as far as the YAML alone decides them.

What such a key needs of the machine says `device_needs`; that is looked at where ranks start.
"""

from __future__ import annotations

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import EP, ETP, PP, Problems, set_value
from megatron_moe.config.schema import Experiment

_SPEC = "model.spec"
_OFFLOADED_LAYERS = "recompute.cpu_offloading_num_layers"


def blocks_of_transformer_engine(e: Experiment) -> Problems:
    """What only the blocks of Transformer Engine compute."""
    wanted = {"training.fp8": e.training.fp8 is not None}
    wanted[_OFFLOADED_LAYERS] = e.recompute.cpu_offloading_num_layers > 0
    for key, is_wanted in wanted.items():
        if is_wanted and e.model.spec != "transformer_engine":
            yield Problem(
                (key, _SPEC),
                f"does not work with the blocks of {_SPEC}",
                f"set {_SPEC} to transformer_engine, or leave it out",
            )


def dead_without_their_switch(e: Experiment) -> Problems:
    """Keys that say how something is done, where it is not done."""
    o, precision_aware = e.optimizer, "optimizer.use_precision_aware_optimizer"
    rows = [
        (
            "training.fp8_recipe",
            e.training.fp8_recipe != "delayed",
            "training.fp8",
            e.training.fp8 is not None,
        ),
        *(
            (
                f"optimizer.{name}",
                getattr(o, name) != "fp32",
                precision_aware,
                o.use_precision_aware_optimizer,
            )
            for name in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        ),
        (
            "optimizer.optimizer_offload_fraction",
            o.optimizer_offload_fraction != 1.0,
            "optimizer.optimizer_cpu_offload",
            o.optimizer_cpu_offload,
        ),
    ]
    for key, is_set, switch, is_on in rows:
        if is_set and not is_on:
            yield Problem((key, switch), f"has no effect without {switch}", f"set {switch}, or leave it out")
    dispatcher = "moe.moe_token_dispatcher_type"
    moe = e.moe
    if moe and moe.moe_flex_dispatcher_backend != "deepep" and moe.moe_token_dispatcher_type != "flex":
        keys = ("moe.moe_flex_dispatcher_backend", dispatcher)
        yield Problem(keys, f"has no effect under {dispatcher}", f"set {dispatcher} to flex, or leave it out")
    if e.model.apply_rope_fusion and e.model.position_embedding_type != "rope":
        keys = ("model.apply_rope_fusion", "model.position_embedding_type")
        yield Problem(keys, f"has no effect under {keys[1]}", f"set {keys[1]} to rope, or leave it out")


def main_grads_as_reduced(e: Experiment) -> Problems:
    """The optimizer reads gradients in the precision in which they were reduced, or a higher one."""
    o = e.optimizer
    if o.use_precision_aware_optimizer and o.main_grads_dtype == "bf16" and e.parallel.grad_reduce_in_fp32:
        keys = ("optimizer.main_grads_dtype", "parallel.grad_reduce_in_fp32")
        yield Problem(keys, f"does not go with {keys[1]}", f"set {keys[1]} to false, or use fp32")


def one_optimizer_state(e: Experiment) -> Problems:
    """The optimizer on the host keeps its state in fp32."""
    if e.optimizer.optimizer_cpu_offload and e.optimizer.use_precision_aware_optimizer:
        keys = ("optimizer.optimizer_cpu_offload", "optimizer.use_precision_aware_optimizer")
        yield Problem(keys, f"keeps the state in fp32, whatever {keys[1]} says", "keep one of the two")


def offloaded_state_needs_bf16(e: Experiment) -> Problems:
    """Megatron-Core's optimizer on two devices takes no weights in fp32."""
    if e.optimizer.optimizer_cpu_offload and e.training.precision == "fp32":
        keys = ("optimizer.optimizer_cpu_offload", "training.precision")
        yield Problem(keys, f"does not work with {keys[1]}", f"set {keys[1]} to bf16, or leave it out")


def offloaded_layers(e: Experiment) -> Problems:
    """Megatron-Core keeps activations on the host for some layers of one stage, without recompute."""
    count, layers = e.recompute.cpu_offloading_num_layers, e.model.num_layers
    if count == 0:
        return
    if count >= layers:
        advice = f"use at most {layers - 1}" if layers > 1 else "leave it out"
        yield Problem((_OFFLOADED_LAYERS, "model.num_layers"), "is not below model.num_layers", advice)
    if e.parallel.pipeline_model_parallel_size > 1:
        yield Problem(
            (_OFFLOADED_LAYERS, PP), f"does not go with {PP} above 1", f"set {PP} to 1, or leave it out"
        )
    again = {
        "recompute.modules": bool(e.recompute.modules),
        "recompute.layers_per_stage": any(set_value(e.recompute.layers_per_stage)),
        "recompute.granularity": e.recompute.granularity not in (None, "none"),
    }
    if key := next((key for key, recomputes in again.items() if recomputes), None):
        yield Problem((_OFFLOADED_LAYERS, key), f"does not go with {key}", "keep one of the two")


def flex_has_ranks_to_reach(e: Experiment) -> Problems:
    """The kernels of the flex dispatcher want more than one rank for the experts."""
    if e.moe is None or e.moe.moe_token_dispatcher_type != "flex":
        return
    ranks = set_value(e.parallel.expert_model_parallel_size) * set_value(
        e.parallel.expert_tensor_parallel_size
    )
    if ranks == 1:
        keys = ("moe.moe_token_dispatcher_type", EP, ETP)
        yield Problem(
            keys, f"needs {EP} times {ETP} above 1", "use alltoall, or spread the experts over ranks"
        )
