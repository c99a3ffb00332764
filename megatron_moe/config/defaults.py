"""Every value that the user may leave out because it follows from others.

`DERIVED_KEYS` is the table: one key, one function of the experiment, in an order in which each finds what it
needs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_moe.config import tokenizer_files
from megatron_moe.config.cluster_defaults import CLUSTER_KEYS
from megatron_moe.config.errors import ConfigError, InputError
from megatron_moe.config.group_scores import group_score_topk
from megatron_moe.config.keys import leaves
from megatron_moe.config.layout_string import (
    AUTO,
    LayoutMistake,
    layers_are_placed,
    layers_of,
    layers_per_stage,
    mtp_of,
)
from megatron_moe.config.origin import Problem, shown
from megatron_moe.config.reads import with_reads
from megatron_moe.config.schema import Experiment, Section
from megatron_moe.config.stage_counts import around_counts, is_counted

_S = TypeVar("_S", bound=Section)


class Underivable(Exception):
    """A default that the other values do not determine, with the problem to report unless a rule does it."""

    def __init__(self, problem: Problem | None = None) -> None:
        self.problem = problem
        super().__init__(problem.text if problem else "")


@dataclass
class Filled:
    """An experiment with its derived defaults, and what stood in the way of some."""

    experiment: Experiment
    derived: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Each key that was filled in -> the keys that its value follows from."""
    problems: list[Problem] = field(default_factory=list)
    as_written: dict[str, str] = field(default_factory=dict)
    """The layout string by its key, where a list of layers took its place."""
    partial: bool = False
    """The experiment lacks keys, broken or underivable ones: reading one raises AttributeError."""


def fill(experiment: Experiment, world_size: int | None = None) -> Experiment:
    """The experiment with a value for every key whose default is derived.

    `world_size` is the number of ranks where it is known (torchrun, srun); it decides the data-parallel size.
    Raises ConfigError where the values contradict each other so that no default follows.
    """
    filled = attempt(experiment, world_size)
    if filled.partial or filled.problems:
        values = dict(leaves(filled.experiment)) | filled.as_written
        raise ConfigError(*(problem.render(values, {}) for problem in filled.problems))
    return filled.experiment


def attempt(experiment: Experiment, world_size: int | None = None, partial: bool = False) -> Filled:
    """`fill` as far as it goes: what depends on a key that a `partial` experiment lacks is left out."""
    filled = Filled(experiment, partial=partial)
    with contextlib.suppress(AttributeError) if partial else contextlib.nullcontext():
        _read_layout_string(filled)
    for key, derive in DERIVED_KEYS:
        try:
            if _given(filled.experiment, key):
                continue
            value, keys = with_reads(derive, filled.experiment, world_size)
        except Underivable as error:
            filled.problems += [error.problem] if error.problem else []
            filled.experiment, filled.partial = _without(filled.experiment, key), True
        except AttributeError:
            if not filled.partial:
                raise
            filled.experiment = _without(filled.experiment, key)
        else:
            filled.experiment = _with(filled.experiment, key, value)
            filled.derived[key] = keys
            if world_size is not None and key == "parallel.data_parallel_size":
                filled.derived[key] += ("the number of ranks",)
    with contextlib.suppress(AttributeError) if filled.partial else contextlib.nullcontext():
        filled.problems += world_size_contradicted(filled.experiment, world_size)
    return filled


def _read_layout_string(filled: Filled) -> None:
    """Put the layers of each stage in the place of a layout string. VPP follows from it unless it is given,
    as in Megatron."""
    key, virtual = "pipeline.layers_per_stage", "parallel.virtual_pipeline_model_parallel_size"
    text = filled.experiment.pipeline.layers_per_stage
    if not isinstance(text, str) or text == AUTO:
        return
    try:
        layers = layers_of(text)
    except LayoutMistake as mistake:
        filled.problems.append(Problem((key,), f"{shown(text)} {mistake.reason}", mistake.remedy))
        filled.experiment, filled.partial = _without(filled.experiment, key), True
        return
    filled.experiment = _with(filled.experiment, key, layers)
    filled.as_written[key] = text
    parallel = filled.experiment.parallel
    if parallel.virtual_pipeline_model_parallel_size is None:
        ranks = parallel.pipeline_model_parallel_size
        is_interleaved = ranks > 1 and len(layers) % ranks == 0
        filled.experiment = _with(filled.experiment, virtual, len(layers) // ranks if is_interleaved else 1)
        filled.derived[virtual] = (key,)
    _place_mtp(filled, key, *mtp_of(text))


def _place_mtp(filled: Filled, key: str, count: int, stage: int) -> None:
    """Take from a layout string where multi-token prediction stands, or report what contradicts it."""
    model, own = filled.experiment.model, "pipeline.mtp_stage"
    given, mtp = filled.experiment.pipeline.mtp_stage, "model.mtp_num_layers"
    if count != model.mtp_num_layers:
        text = f"has {count or 'no'} m, and not one for each of {mtp}"
        advice = f"write {model.mtp_num_layers} m" if model.mtp_num_layers else "leave m out"
        filled.problems.append(Problem((key, mtp), text, f"{advice}, or change {mtp}"))
    elif count and given not in (None, stage):
        filled.problems.append(Problem((own, key), f"is not {stage}, where {key} has m", "leave it out"))
        filled.experiment, filled.partial = _without(filled.experiment, key), True
    elif count and given is None:
        filled.experiment = _with(filled.experiment, own, stage)
        filled.derived[own] = (key,)


def _given(experiment: Experiment, key: str) -> bool:
    """Whether there is nothing to derive: the user set the key, or its section does not exist."""
    *sections, name = key.split(".")
    holder: Any = experiment
    for section in sections:
        holder = getattr(holder, section)
        if holder is None:
            return True
    return getattr(holder, name) is not None


def _with(holder: _S, key: str, value: Any) -> _S:
    section, _, inner = key.partition(".")
    return holder.model_copy(
        update={section: _with(getattr(holder, section), inner, value) if inner else value}
    )


def _without(holder: _S, key: str) -> _S:
    section, _, inner = key.partition(".")
    if not inner:
        lacking = holder.model_copy()
        lacking.__dict__.pop(section, None)
        return lacking
    held = getattr(holder, section, None)
    return holder if held is None else holder.model_copy(update={section: _without(held, inner)})


def _kv_channels(e: Experiment, world_size: int | None) -> int:
    if (latent := e.model.multi_latent_attention) is not None:
        return latent.qk_head_dim + latent.qk_pos_emb_head_dim
    if e.model.hidden_size % e.model.num_attention_heads:
        heads = divisors_of(e.model.hidden_size)
        near = nearest_multiples(e.model.hidden_size, e.model.num_attention_heads)
        raise Underivable(
            Problem(
                ("model.hidden_size", "model.num_attention_heads"),
                "is not divisible by model.num_attention_heads, and model.kv_channels is not set",
                f"use a hidden_size of {near}, {heads} heads, or set model.kv_channels",
            )
        )
    return e.model.hidden_size // e.model.num_attention_heads


def _group_score_topk(e: Experiment, world_size: int | None) -> int | None:
    assert e.moe is not None
    return group_score_topk(e.moe)


def _vocab_size(e: Experiment, world_size: int | None) -> int:
    tokenizer = e.data.tokenizer
    if tokenizer.kind == "bytes":
        return tokenizer_files.BYTES_VOCAB_SIZE
    if tokenizer.vocab_size is not None and tokenizer.kind == "sentencepiece":
        return tokenizer.vocab_size
    if tokenizer.model is not None:
        try:
            return tokenizer_files.vocab_size(tokenizer.kind, tokenizer.model, tokenizer.eod)
        except InputError as error:
            reason = str(error).removeprefix(f"{tokenizer.model}: ")
            text = f"gives no model.vocab_size: {reason}"
            advice = "name another file, or set model.vocab_size"
            raise Underivable(Problem(("data.tokenizer.model",), text, advice)) from None
    if e.data.kind != "mock":
        raise Underivable  # tokenizer_rules.tokenizer_said_once says what is missing
    raise Underivable(
        Problem(
            ("model.vocab_size",),
            "is not set and no tokenizer gives it",
            "set model.vocab_size, data.tokenizer.vocab_size, or data.tokenizer.model",
        )
    )


def _expert_model_parallel_size(e: Experiment, world_size: int | None) -> int:
    return 1 if e.moe is None else e.parallel.tensor_model_parallel_size


def _data_parallel_size(e: Experiment, world_size: int | None) -> int:
    p = e.parallel
    model_ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    if world_size is not None:
        if world_size % model_ranks:
            raise Underivable(_ranks_do_not_fit(world_size, model_ranks))
        return world_size // model_ranks
    assert p.expert_tensor_parallel_size is not None and p.expert_model_parallel_size is not None
    experts = p.expert_tensor_parallel_size * p.expert_model_parallel_size
    return experts // math.gcd(experts, p.tensor_model_parallel_size * p.context_parallel_size)


def _ranks_do_not_fit(world_size: int, model_ranks: int) -> Problem:
    below = world_size // model_ranks * model_ranks
    counts = " or ".join(str(count) for count in (below, below + model_ranks) if count)
    keys = tuple(f"parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
    text = f"times {keys[1]} times {keys[2]} is {model_ranks}, which does not divide the {world_size} ranks"
    return Problem(
        keys, text, f"start {counts} ranks, or make these three multiply to a divisor of {world_size}"
    )


def _layers_per_stage(e: Experiment, world_size: int | None) -> list[int]:
    p, layers = e.parallel, e.model.num_layers
    chunks = p.virtual_pipeline_model_parallel_size or 1
    stages = p.pipeline_model_parallel_size * chunks
    if is_counted(e):
        split = around_counts(e, stages)
        if isinstance(split, Problem):
            raise Underivable(split)
        return split
    if layers % stages == 0:
        return [layers // stages] * stages
    if layers < stages:
        advice = f"use at least {stages} layers, or fewer stages"
    else:
        uneven = [layers // stages + (1 if stage < layers % stages else 0) for stage in range(stages)]
        advice = (
            f"use {nearest_multiples(layers, stages)} layers, or say the split: pipeline.layers_per_stage: "
            f"{uneven if stages <= 16 else 'a list that adds up to ' + str(layers)}, or auto"
        )
    keys: tuple[str, ...] = ("model.num_layers", "parallel.pipeline_model_parallel_size")
    over = keys[1]
    if chunks > 1:
        keys += ("parallel.virtual_pipeline_model_parallel_size",)
        over = f"{keys[1]} times {keys[2]}"
    raise Underivable(Problem(keys, f"layers do not divide evenly over {over}", advice))


def _recompute_granularity(e: Experiment, world_size: int | None) -> str:
    if any(e.recompute.layers_per_stage or ()):
        return "full"
    return "selective" if e.recompute.modules else "none"


def _recompute_layers_per_stage(e: Experiment, world_size: int | None) -> list[int]:
    """All layers: for `block` as many as the longest chunk of a rank has, for `uniform` groups of one."""
    ranks = e.parallel.pipeline_model_parallel_size
    if e.recompute.granularity != "full":
        return [0] * ranks
    if layers_are_placed(e):
        # As many as there may be; `plan.auto` makes it what each rank holds.
        return [e.model.num_layers if e.recompute.method == "block" else 1] * ranks
    layers = layers_per_stage(e)
    longest = [max(layers[rank::ranks], default=0) for rank in range(ranks)]
    return longest if e.recompute.method == "block" else [min(1, count) for count in longest]


def _warmup_iters(e: Experiment, world_size: int | None) -> int:
    assert e.optimizer.lr_decay_iters is not None
    return round((e.optimizer.lr_warmup_fraction or 0.0) * e.optimizer.lr_decay_iters)


def _wsd_decay_iters(e: Experiment, world_size: int | None) -> int | None:
    assert e.optimizer.lr_decay_iters is not None
    return max(1, round(e.optimizer.lr_decay_iters / 10)) if e.optimizer.lr_decay_style == "WSD" else None


def _moe_ffn_hidden_size(e: Experiment, world_size: int | None) -> int | None:
    return e.model.ffn_hidden_size


def _moe_eval_capacity_factor(e: Experiment, world_size: int | None) -> float | str | None:
    assert e.moe is not None
    return e.moe.moe_expert_capacity_factor


def _moe_input_jitter_eps(e: Experiment, world_size: int | None) -> float | None:
    assert e.moe is not None
    return 0.01 if e.moe.moe_router_gate == "switch" else None


def _moe_num_device_groups(e: Experiment, world_size: int | None) -> int | None:
    assert e.moe is not None
    is_swipe = e.moe.moe_router_gate == "swipe"
    return e.moe.num_moe_experts if is_swipe else e.moe.moe_router_num_groups


def _per_token_loss(e: Experiment, world_size: int | None) -> bool:
    instruction = e.data.instruction
    return instruction is not None and instruction.weighting == "token"


def _lora_alpha(e: Experiment, world_size: int | None) -> float:
    assert e.training.lora is not None
    return 2.0 * e.training.lora.rank


DERIVED_KEYS: list[tuple[str, Callable[[Experiment, int | None], Any]]] = [
    ("model.num_query_groups", lambda e, _: e.model.num_attention_heads),
    ("model.kv_channels", _kv_channels),
    ("model.ffn_hidden_size", lambda e, _: 4 * e.model.hidden_size),
    ("model.vocab_size", _vocab_size),
    ("model.max_position_embeddings", lambda e, _: e.training.seq_length),
    ("moe.moe_ffn_hidden_size", _moe_ffn_hidden_size),
    ("moe.moe_expert_activation", lambda e, _: e.model.activation),
    ("moe.moe_input_jitter_eps", _moe_input_jitter_eps),
    ("moe.moe_router_group_score_topk", _group_score_topk),
    ("moe.moe_num_device_groups", _moe_num_device_groups),
    ("moe.moe_eval_capacity_factor", _moe_eval_capacity_factor),
    ("parallel.virtual_pipeline_model_parallel_size", lambda e, _: 1),
    ("parallel.expert_model_parallel_size", _expert_model_parallel_size),
    ("parallel.expert_tensor_parallel_size", lambda e, _: 1),
    ("parallel.sequence_parallel", lambda e, _: e.parallel.tensor_model_parallel_size > 1),
    ("parallel.data_parallel_size", _data_parallel_size),
    ("pipeline.layers_per_stage", _layers_per_stage),
    ("recompute.granularity", _recompute_granularity),
    ("recompute.modules", lambda e, _: ["core_attn"] if e.recompute.granularity == "selective" else []),
    ("recompute.layers_per_stage", _recompute_layers_per_stage),
    ("training.calculate_per_token_loss", _per_token_loss),
    ("optimizer.lr_decay_iters", lambda e, _: e.training.train_iters),
    ("optimizer.lr_warmup_iters", _warmup_iters),
    ("optimizer.lr_wsd_decay_iters", _wsd_decay_iters),
    *CLUSTER_KEYS,
    ("training.lora.alpha", _lora_alpha),
]


def world_size_contradicted(e: Experiment, world_size: int | None) -> list[Problem]:
    """The problem of a data-parallel size that the number of ranks contradicts, if it does."""
    p = e.parallel
    assert p.data_parallel_size is not None
    model_ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    if world_size is None or model_ranks * p.data_parallel_size == world_size:
        return []
    if world_size % model_ranks:
        return [_ranks_do_not_fit(world_size, model_ranks)]
    others = tuple(f"parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
    text = f"times {others[0]} times {others[1]} times {others[2]} is not {world_size}, the number of ranks"
    started = model_ranks * p.data_parallel_size
    advice = f"set {world_size // model_ranks}, leave it out, or start {started} ranks"
    return [Problem(("parallel.data_parallel_size", *others), text, advice)]


def nearest_multiples(value: int, of: int) -> str:
    """The multiples of `of` next to `value`, zero left out: `4 or 8`."""
    below = value // of * of
    return " or ".join(str(multiple) for multiple in (below, below + of) if multiple)


def divisors_of(value: int, limit: int = 8) -> str:
    """The divisors of `value`, at most `limit` of the smaller ones: `1, 2, 3 or 6`."""
    found = (
        [divisor for divisor in range(1, value + 1) if value % divisor == 0]
        if value < 100_000
        else [1, 2, 4, 8]
    )
    found = [divisor for divisor in found if value % divisor == 0][:limit]
    return f"{', '.join(map(str, found[:-1]))} or {found[-1]}" if len(found) > 1 else str(found[0])
