"""Every rule that looks at more than one key, one short function each, in one table at the end.

A rule gets an experiment whose derived defaults are filled and yields the problems it finds. Rules about
`model.megatron_core` are in `megatron_core_rules`. Abbreviations in names: TP, PP, VPP, CP, DP, EP, ETP as in the schema.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

from megatron_moe.config.defaults import divisors_of, nearest_multiples
from megatron_moe.config.megatron_core_rules import megatron_core_fields
from megatron_moe.config.origin import Problem
from megatron_moe.config.schema import Experiment

Problems = Iterator[Problem]

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
DP = "parallel.data_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
SP = "parallel.sequence_parallel"

MEGATRON_CORE_VERSIONS = ((0, 16, 1), (0, 20, 0))
"""The first version that is supported, and the first one that is not."""


def set_value(value: Any) -> Any:
    """A value that `defaults.fill` has set: it is None only in an experiment that was not filled."""
    assert value is not None, "rules look at filled experiments only"
    return value


def _divides(key: str, value: int, by_key: str, by: int) -> Problems:
    if value % by:
        advice = f"use {nearest_multiples(value, by)}, or {by_key.rpartition('.')[2]} {divisors_of(value)}"
        yield Problem((key, by_key), f"is not divisible by {by_key}", advice)


def heads_over_tp(e: Experiment) -> Problems:
    """Each TP rank holds whole query heads."""
    yield from _divides(
        "model.num_attention_heads", e.model.num_attention_heads, TP, e.parallel.tensor_model_parallel_size
    )


def query_groups_over_tp(e: Experiment) -> Problems:
    """Each TP rank holds whole key and value heads."""
    groups = set_value(e.model.num_query_groups)
    if groups == e.model.num_attention_heads:  # heads_over_tp says it already
        return
    yield from _divides("model.num_query_groups", groups, TP, e.parallel.tensor_model_parallel_size)


def heads_over_query_groups(e: Experiment) -> Problems:
    """Each key and value head serves the same number of query heads."""
    groups = set_value(e.model.num_query_groups)
    yield from _divides(
        "model.num_attention_heads", e.model.num_attention_heads, "model.num_query_groups", groups
    )


def ffn_over_tp(e: Experiment) -> Problems:
    """Each TP rank holds an equal part of a dense feed-forward layer, where there is one."""
    if e.moe is not None and all(moe_layers(e)):
        return
    yield from _divides(
        "model.ffn_hidden_size", set_value(e.model.ffn_hidden_size), TP, e.parallel.tensor_model_parallel_size
    )


def expert_ffn_over_etp(e: Experiment) -> Problems:
    """Each ETP rank holds an equal part of every expert."""
    if e.moe is not None:
        width, etp = set_value(e.moe.moe_ffn_hidden_size), set_value(e.parallel.expert_tensor_parallel_size)
        yield from _divides("moe.moe_ffn_hidden_size", width, ETP, etp)


def shared_experts_over_tp(e: Experiment) -> Problems:
    """Shared experts are split over TP like a dense layer."""
    if e.moe is not None and e.moe.moe_shared_expert_intermediate_size is not None:
        key = "moe.moe_shared_expert_intermediate_size"
        yield from _divides(
            key, e.moe.moe_shared_expert_intermediate_size, TP, e.parallel.tensor_model_parallel_size
        )


def experts_over_ep(e: Experiment) -> Problems:
    """Each EP rank holds the same number of experts."""
    if e.moe is not None:
        yield from _divides(
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
        text = f"times {ETP} is {ep * etp}, which does not divide the {stage_ranks} ranks of a stage, {TP} times {CP} times {DP}"
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


def topk_within_experts(e: Experiment) -> Problems:
    """A token goes to different experts."""
    if e.moe is not None and e.moe.moe_router_topk > e.moe.num_moe_experts:
        text = "is more than moe.num_moe_experts"
        yield Problem(
            ("moe.moe_router_topk", "moe.num_moe_experts"), text, f"use at most {e.moe.num_moe_experts}"
        )


def moe_layer_list_length(e: Experiment) -> Problems:
    """A list of MoE layers says so for each layer, and names one at least."""
    if e.moe is None or not isinstance(e.moe.moe_layer_freq, list):
        return
    keys = ("moe.moe_layer_freq", "model.num_layers")
    if len(e.moe.moe_layer_freq) != e.model.num_layers:
        text = f"has {len(e.moe.moe_layer_freq)} entries and not one for each of the model.num_layers"
        yield Problem(keys, text, f"give it {e.model.num_layers} entries, 1 for MoE and 0 for dense")
    elif not any(e.moe.moe_layer_freq):
        yield Problem(keys[:1], "names no MoE layer", "set an entry to 1, or make the model dense: moe=null")


def moe_with_tp_needs_sp(e: Experiment) -> Problems:
    """Megatron-Core's MoE layer with TP trains right only on a sharded sequence."""
    if e.moe is not None and e.parallel.tensor_model_parallel_size > 1 and not e.parallel.sequence_parallel:
        yield Problem(
            (SP, TP), f"does not go with experts and {TP} above 1", "set it to true, or leave it out"
        )


def sp_needs_tp(e: Experiment) -> Problems:
    """There is nothing to shard the sequence over."""
    if e.parallel.sequence_parallel and e.parallel.tensor_model_parallel_size == 1:
        yield Problem((SP, TP), f"needs {TP} above 1", "set it to false, or leave it out")


def rope_needs_even_width(e: Experiment) -> Problems:
    """Rotary positions turn pairs of channels."""
    width = int(set_value(e.model.kv_channels) * e.model.rotary_percent)
    if e.model.position_embedding_type == "rope" and (width % 2 or width == 0):
        keys = ("model.kv_channels", "model.rotary_percent")
        text = (
            f"times model.rotary_percent is {width} rotated channels a head, which must be even and above 0"
        )
        yield Problem(
            keys,
            text,
            f"set model.kv_channels to {set_value(e.model.kv_channels) + 1}, or another rotary_percent",
        )


def sequence_over_ranks(e: Experiment) -> Problems:
    """The sequence is cut into 2 x CP pieces, and each CP rank's part over TP under sequence parallelism."""
    p, s = e.parallel, e.training.seq_length
    tp = p.tensor_model_parallel_size if p.sequence_parallel else 1
    cp = p.context_parallel_size
    if cp > 1 and s % (2 * cp):
        text = f"is not divisible by 2 x {CP}"
        yield Problem(("training.seq_length", CP), text, f"use {nearest_multiples(s, 2 * cp * tp)}")
    elif s % (cp * tp):
        over, keys = f"{TP} under {SP}", ("training.seq_length", TP, SP)
        if cp > 1:
            over, keys = f"{CP} times {TP} under {SP}", ("training.seq_length", CP, TP, SP)
        yield Problem(
            keys, f"is not divisible by {over}", f"use {nearest_multiples(s, (2 * cp if cp > 1 else 1) * tp)}"
        )


def positions_reach_sequence(e: Experiment) -> Problems:
    """Every place of a sequence has a position."""
    if set_value(e.model.max_position_embeddings) < e.training.seq_length:
        keys = ("model.max_position_embeddings", "training.seq_length")
        yield Problem(
            keys, "is less than training.seq_length", f"use at least {e.training.seq_length}, or leave it out"
        )


def padded_vocab_over_tp(e: Experiment) -> Problems:
    """Each TP rank holds an equal part of the padded vocabulary."""
    unit, tp = e.model.make_vocab_size_divisible_by, e.parallel.tensor_model_parallel_size
    padded = -(-set_value(e.model.vocab_size) // unit) * unit
    if padded % tp:
        text = f"pads model.vocab_size to {padded}, which is not divisible by {TP}"
        yield Problem(
            ("model.make_vocab_size_divisible_by", "model.vocab_size", TP),
            text,
            f"use {nearest_multiples(unit, tp)}",
        )


def batch_over_replicas(e: Experiment) -> Problems:
    """A step is a whole number of microbatches on every replica; the interleaved schedule takes them PP at a time."""
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


def vpp_needs_pp(e: Experiment) -> Problems:
    """Chunks are interleaved between pipeline ranks."""
    if (
        set_value(e.parallel.virtual_pipeline_model_parallel_size) > 1
        and e.parallel.pipeline_model_parallel_size == 1
    ):
        yield Problem((VPP, PP), f"needs {PP} above 1", "leave it out, or use more pipeline ranks")


def stages_add_up(e: Experiment) -> Problems:
    """Each layer is in exactly one stage, and each stage has one."""
    layers, key = set_value(e.pipeline.layers_per_stage), "pipeline.layers_per_stage"
    pp, vpp = (
        e.parallel.pipeline_model_parallel_size,
        set_value(e.parallel.virtual_pipeline_model_parallel_size),
    )
    if len(layers) != pp * vpp:
        text = f"has {len(layers)} entries and not {pp * vpp}, {PP} times {VPP}"
        yield Problem((key, PP, VPP), text, f"give it {pp * vpp} entries that add up to {e.model.num_layers}")
    elif sum(layers) != e.model.num_layers:
        text = f"adds up to {sum(layers)} and not to model.num_layers"
        even = [(e.model.num_layers + stage) // len(layers) for stage in range(len(layers))][::-1]
        yield Problem((key, "model.num_layers"), text, f"for example {even}")
    elif 0 in layers:
        text = f"leaves stage {layers.index(0) + 1} without a layer"
        yield Problem((key,), text, "give each stage at least 1 layer, or use fewer stages")


def recompute_within_stages(e: Experiment) -> Problems:
    """No more layers are recomputed than there are; `uniform` needs groups that come out even."""
    counts, layers = set_value(e.recompute.layers_per_stage), set_value(e.pipeline.layers_per_stage)
    key, stages, pp = (
        "recompute.layers_per_stage",
        "pipeline.layers_per_stage",
        e.parallel.pipeline_model_parallel_size,
    )
    if len(counts) != pp:
        yield Problem(
            (key, PP),
            f"has {len(counts)} entries and not {PP}",
            f"give it {pp} entries, for example {[0] * pp}",
        )
        return
    for rank, count in enumerate(counts):
        chunks = layers[rank::pp]
        if not chunks:
            continue
        if count > max(chunks):
            text = f"recomputes {count} layers on pipeline rank {rank}, which holds {max(chunks)} by {stages}"
            yield Problem((key, stages), text, f"use at most {max(chunks)} there")
        elif count and e.recompute.method == "uniform" and any(held % count for held in chunks):
            text = f"makes groups of {count} layers on pipeline rank {rank}, which do not divide its {chunks[0]} by {stages}"
            yield Problem(
                (key, stages), text, f"use {divisors_of(min(chunks))} there, or recompute.method block"
            )


def warmup_said_once(e: Experiment) -> Problems:
    """Iterations and fraction say the same thing; both may stand there only if they agree."""
    o, keys = e.optimizer, ("optimizer.lr_warmup_iters", "optimizer.lr_warmup_fraction")
    if o.lr_warmup_fraction is not None:
        by_fraction = round(o.lr_warmup_fraction * set_value(o.lr_decay_iters))
        if o.lr_warmup_iters != by_fraction:
            yield Problem(
                keys, f"disagrees with {keys[1]}, which means {by_fraction} iterations", "keep one of the two"
            )


def warmup_within_decay(e: Experiment) -> Problems:
    """The warm-up is a part of the decay."""
    keys = ("optimizer.lr_warmup_iters", "optimizer.lr_decay_iters")
    decay = set_value(e.optimizer.lr_decay_iters)
    if set_value(e.optimizer.lr_warmup_iters) > decay:
        yield Problem(
            keys,
            "is more than optimizer.lr_decay_iters",
            f"use at most {decay}, or a lr_warmup_fraction of 0.1",
        )


def min_lr_below_lr(e: Experiment) -> Problems:
    """The learning rate decays downwards."""
    if e.optimizer.min_lr > e.optimizer.lr:
        keys = ("optimizer.min_lr", "optimizer.lr")
        yield Problem(keys, "is more than optimizer.lr", f"use at most {e.optimizer.lr:g}")


def split_has_training_part(e: Experiment) -> Problems:
    """Something is left to train on."""
    if e.data.split[0] == 0:
        yield Problem(
            ("data.split",),
            "leaves nothing to train on",
            "make the first entry positive, for example [95, 5]",
        )


def evaluation_has_data(e: Experiment) -> Problems:
    """What is evaluated on is held out."""
    if e.training.eval_interval is not None and e.data.split[1] == 0 and e.data.kind != "mock":
        keys = ("training.eval_interval", "data.split")
        yield Problem(
            keys,
            "needs a validation part, and data.split has none",
            "set data.split to [95, 5], or leave it out",
        )


def data_said_once(e: Experiment) -> Problems:
    """Token files are either given or made; mock data has none."""
    d = e.data
    if d.kind == "mock":
        for key, value in (("data.path", d.path), ("data.prepare.input", d.prepare and d.prepare.input)):
            if value is not None:
                yield Problem(
                    (key, "data.kind"),
                    "is not read under data.kind",
                    "leave it out, or set data.kind to pretraining",
                )
    elif d.path is None and d.prepare is None:
        yield Problem(
            ("data.path", "data.prepare"), "is not set, and neither is data.prepare", "set one of the two"
        )
    elif d.path is not None and d.prepare is not None:
        yield Problem(
            ("data.path", "data.prepare.input"), "and data.prepare.input are both set", "keep one of the two"
        )


def tokenizer_said_once(e: Experiment) -> Problems:
    """A tokenizer is bytes, a file, or trained on the text that is prepared."""
    t, model, size = e.data.tokenizer, "data.tokenizer.model", "data.tokenizer.vocab_size"
    if t.kind == "bytes":
        for key, value in ((model, t.model), (size, t.vocab_size)):
            if value is not None:
                yield Problem(
                    (key, "data.tokenizer.kind"), "is not used with data.tokenizer.kind", "leave it out"
                )
    elif t.model is not None and t.vocab_size is not None:
        yield Problem(
            (model, size),
            f"is a tokenizer with a size of its own, so that {size} has no effect",
            "keep one of the two",
        )
    elif e.data.kind == "pretraining" and t.model is None:
        if e.data.prepare is None:
            text = "is not set, and there is no data.prepare to train one on"
            yield Problem((model, "data.prepare"), text, "set it, or data.tokenizer.kind to bytes")
        elif t.vocab_size is None:
            text = f"is not set, and neither is {model}"
            yield Problem((size, model), text, "set the size of the tokenizer to train, for example 2048")


def transformer_engine_installed(e: Experiment) -> Problems:
    """The spec is what the user says, never what happens to be installed."""
    if e.model.spec == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        yield Problem(
            ("model.spec",),
            "needs the package transformer_engine, which is not installed here",
            "set it to native",
        )


def megatron_core_supported(e: Experiment) -> Problems:
    """The engine leans on internals of Megatron-Core that were looked at in these versions only."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    first, beyond = MEGATRON_CORE_VERSIONS
    if found is None or not first <= tuple(int(part or 0) for part in found.groups()) < beyond:
        text = f"cannot be trained with megatron-core {version}, the installed version"
        yield Problem(("model",), text, "pip install 'megatron-core>=0.16.1,<0.20'")


def moe_layers(e: Experiment) -> list[bool]:
    """One entry a layer: whether it is MoE."""
    if e.moe is None:
        return [False] * e.model.num_layers
    freq = e.moe.moe_layer_freq
    return (
        [bool(entry) for entry in freq]
        if isinstance(freq, list)
        else [i % freq == 0 for i in range(e.model.num_layers)]
    )


RULES: list[Callable[[Experiment], Problems]] = [
    megatron_core_supported,
    transformer_engine_installed,
    megatron_core_fields,
    heads_over_tp,
    heads_over_query_groups,
    query_groups_over_tp,
    rope_needs_even_width,
    ffn_over_tp,
    padded_vocab_over_tp,
    positions_reach_sequence,
    topk_within_experts,
    expert_ffn_over_etp,
    shared_experts_over_tp,
    moe_layer_list_length,
    experts_over_ep,
    expert_ranks_fold,
    dense_has_no_experts,
    moe_with_tp_needs_sp,
    sp_needs_tp,
    sequence_over_ranks,
    vpp_needs_pp,
    stages_add_up,
    recompute_within_stages,
    data_said_once,
    tokenizer_said_once,
    split_has_training_part,
    evaluation_has_data,
    warmup_said_once,
    warmup_within_decay,
    min_lr_below_lr,
    batch_over_replicas,
]


def violations(experiment: Experiment, partial: bool = False) -> list[Problem]:
    """All problems of a filled experiment. A `partial` one lacks keys; rules that need one of these are skipped."""
    found: list[Problem] = []
    for rule in RULES:
        try:
            found += list(rule(experiment))
        except AttributeError:
            if not partial:
                raise
    return found
