"""Rules about what the backward pass computes again."""

from __future__ import annotations

from megatron_moe.config.defaults import divisors_of
from megatron_moe.config.layout_string import layers_are_placed, layers_per_stage
from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import PP, Problems, set_value
from megatron_moe.config.schema import Experiment

GRANULARITY = "recompute.granularity"
COUNTS = "recompute.layers_per_stage"
MODULES = "recompute.modules"


def recompute_said_once(e: Experiment) -> Problems:
    """`full` goes by layers, `selective` by modules, and neither looks at the other's key."""
    r = e.recompute
    granularity, modules, counts = r.granularity, set_value(r.modules), set_value(r.layers_per_stage)
    if isinstance(counts, str) and granularity != "full":
        text = f"is for whole layers, and not for {GRANULARITY}"
        yield Problem((COUNTS, GRANULARITY), text, "leave the second one out")
        return
    if granularity == "full" and not any(counts):
        yield Problem((GRANULARITY, COUNTS), f"recomputes nothing under {COUNTS}", "leave the second one out")
    if granularity != "full" and any(counts):
        advice = f"leave it out, or set {GRANULARITY} to full"
        yield Problem((COUNTS, GRANULARITY), f"is not read under {GRANULARITY}", advice)
    if granularity == "selective" and not modules:
        yield Problem((MODULES, GRANULARITY), "is empty", "leave it out, or name what to recompute")
    if granularity != "selective" and modules:
        advice = f"leave it out, or set {GRANULARITY} to selective and leave {COUNTS} out"
        yield Problem((MODULES, GRANULARITY), f"is not read under {GRANULARITY}", advice)
    if granularity == "selective" and r.method == "uniform":
        text = f"is about whole layers, and is not read under {GRANULARITY}"
        yield Problem(("recompute.method", GRANULARITY), text, "leave it out")


def recompute_within_stages(e: Experiment) -> Problems:
    """No more layers are recomputed than there are; `uniform` needs groups that come out even."""
    counts = e.recompute.layers_per_stage
    stages, pp = "pipeline.layers_per_stage", e.parallel.pipeline_model_parallel_size
    if counts is None or isinstance(counts, str):
        return
    if len(counts) != pp:
        text = f"has {len(counts)} entries and not {PP}"
        yield Problem((COUNTS, PP), text, f"give it {pp} entries, for example {[0] * pp}")
        return
    if layers_are_placed(e):
        return
    layers = layers_per_stage(e)
    for rank, count in enumerate(counts):
        chunks = layers[rank::pp]
        if not chunks:
            continue
        if count > max(chunks):
            text = f"recomputes {count} layers on pipeline rank {rank}, which holds {max(chunks)} by {stages}"
            yield Problem((COUNTS, stages), text, f"use at most {max(chunks)} there")
        elif count and e.recompute.method == "uniform" and any(held % count for held in chunks):
            groups = f"makes groups of {count} layers on pipeline rank {rank}"
            text = f"{groups}, which do not divide its {chunks[0]} by {stages}"
            divisors = divisors_of(min(filter(None, chunks)))
            yield Problem((COUNTS, stages), text, f"use {divisors} there, or recompute.method block")


def modules_are_there(e: Experiment) -> Problems:
    """What the model does not have cannot be recomputed, and nothing is recomputed twice."""
    modules, moe = set_value(e.recompute.modules), e.moe
    for name in sorted({name for name in modules if modules.count(name) > 1}):
        yield Problem((MODULES,), f"names {name} twice", "name it once")
    for name in dict.fromkeys(modules):
        lacking = _lacking(e, name)
        if lacking is not None:
            yield Problem((MODULES, lacking), f"names {name}, and {_LACKS[lacking]}", _ADVICE)
        if name in ("moe_act", "shared_experts") and moe is not None and "moe" in modules:
            yield Problem((MODULES,), f"names {name} beside moe, which includes it", _ADVICE)


_ADVICE = "take it out of the list"

_LACKS = {
    "moe": "there is no section moe",
    "moe.moe_layer_freq": "moe.moe_layer_freq leaves no such layer",
    "moe.moe_shared_expert_intermediate_size": "moe.moe_shared_expert_intermediate_size is not set",
}


def _lacking(e: Experiment, module: str) -> str | None:
    """The key by which the model has no such module, None if it has it."""
    if module in ("core_attn", "layernorm"):
        return None
    if e.moe is None:
        return None if module == "mlp" else "moe"
    if module == "shared_experts" and e.moe.moe_shared_expert_intermediate_size is None:
        return "moe.moe_shared_expert_intermediate_size"
    return "moe.moe_layer_freq" if module == "mlp" and all(moe_layers(e)) else None


def modules_can_be_recomputed(e: Experiment) -> Problems:
    """What Megatron-Core has no way to compute again."""
    modules = set_value(e.recompute.modules)
    if "layernorm" in modules and e.model.spec == "transformer_engine" and e.moe is None:
        text = "names layernorm, and the blocks of model.spec keep no output of norms in dense layers"
        yield Problem((MODULES, "model.spec"), text, _ADVICE)
    if e.training.fp8 is not None and e.training.fp8_recipe == "delayed":
        for name in modules:
            if name in ("layernorm", "moe_act"):
                text = f"names {name}, which goes with any training.fp8_recipe but this one"
                yield Problem((MODULES, "training.fp8_recipe"), text, f"{_ADVICE}, or use another recipe")
