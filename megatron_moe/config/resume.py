"""What may differ between the experiment that a checkpoint was written by and the one that goes on from
it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_moe.config.checking import default_of
from megatron_moe.config.keys import known_keys, leaves, named_sections, schema_key, unions
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import AdaptiveCoefficient

Difference = tuple[str, Any, Any]
"""Dotted key, value when saved, value now."""

_WOULD_DROP = "moe.moe_would_drop_capacity_factor"

ALLOWED: dict[str, str] = {
    r"name|logging\..*|launch\..*|resilience\..*|checkpoint\..*": "they do not reach the computation",
    r"training\.(train_iters|eval_interval|eval_iters)|moe\.moe_eval_capacity_factor": (
        "how long, and what is looked at on the way"
    ),
    # Gradients that are reduced in another precision are others.
    r"(parallel\.(?!grad_reduce_in_fp32)|pipeline\.|recompute\.).*": (
        "checkpoints fit every layout, and none changes the mathematics"
    ),
    # An aux loss over a microbatch then has another value, as its docstring says.
    r"training\.micro_batch_size": "the order of the data goes by the global batch",
    r"data\.(blend\.[^.]+\.)?(path|prepare(\.input)?)|data\.tokenizer\.model"
    r"|data\.instruction\.(train|validation|chat_template)": ("files may move; their hashes are compared"),
    r"moe\.moe_(token_dispatcher_type|flex_dispatcher_backend|ranks_per_node|overlap_degree|shadowing.*)": (
        "how tokens travel does not change what is computed"
    ),
    r"moe\.moe_pad_expert_input_to_capacity": "rows of zeros add nothing",
    r"moe\.(moe_shared_expert_overlap|overlap_moe_expert_parallel_comm)": "when it is computed is not what",
    r"training\.gradient_accumulation_fusion|model\.apply_rope_fusion|moe\.moe_permute_fusion": (
        "another kernel computes the same"
    ),
    # But where it drives coefficients: see below.
    re.escape(_WOULD_DROP): "it changes a reported number only",
}
"""Keys, as patterns, that may change, with the reason. All others decide the model, its data, or the steps to
come."""

_SAME_AS = {
    "model.num_query_groups": "model.num_attention_heads",
    "model.max_position_embeddings": "training.seq_length",
    "moe.moe_ffn_hidden_size": "model.ffn_hidden_size",
    "moe.moe_expert_activation": "model.activation",
    "moe.moe_num_device_groups": "moe.moe_router_num_groups",
}
"""Keys that by default have another one's value: where both change alike, one line is enough."""

_FOLLOWS_TRAIN_ITERS = ("lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters")


def differences(
    saved: Mapping[str, Any] | Experiment, current: Experiment
) -> tuple[list[Difference], list[Difference]]:
    """The differences that resume allows, and those that it refuses.

    `saved` is resolved, as an experiment or as nested mappings. A key that it lacks, because it is newer,
    counts as its default. A learning-rate schedule that was the whole run's, before and now, follows
    `training.train_iters`: it may change.
    """
    old, new = dict(leaves(saved)), dict(leaves(current))
    old.pop("model.megatron_core", None), new.pop("model.megatron_core", None)
    for values in (old, new):
        # The planner's machines: a run that moves is no other run, and need not be told of all their figures.
        for key in [key for key in values if key.startswith("launch.cluster.")]:
            del values[key]
    had_experts, has_experts = any(key.startswith("moe.") for key in old), current.moe is not None
    if had_experts != has_experts:
        # One line instead of one for each key.
        for values, there in ((old, had_experts), (new, has_experts)):
            for key in [key for key in values if key.startswith("moe.")]:
                del values[key]
            values["moe"] = "a section" if there else None
    _join_names(old, new)
    _join_variants(old, new)
    allowed: list[Difference] = []
    refused: list[Difference] = []
    for key in sorted(old.keys() | new.keys(), key=_rank):
        before = old[key] if key in old else default_of(key) if schema_key(key) and key in new else None
        after = new.get(key)
        if before != after:
            may = any(re.fullmatch(pattern, key) for pattern in ALLOWED) or _follows(key, old, new)
            may &= key != _WOULD_DROP or not _drop_rate_is_followed(current)
            (allowed if may else refused).append((key, before, after))
    changes = {key: change for key, *change in refused}
    return allowed, [one for one in refused if changes.get(_SAME_AS.get(one[0], "")) != [*one[1:]]]


def _join_names(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Where sections that the user names come or go, tell their names alone apart, in place."""
    for holder in named_sections():
        of_both = [
            {key: key.split(".")[holder.count(".") + 1] for key in values if key.startswith(f"{holder}.")}
            for values in (old, new)
        ]
        if set(of_both[0].values()) == set(of_both[1].values()):
            continue
        for values, keys in zip((old, new), of_both, strict=True):
            for key in keys:
                del values[key]
            values[holder] = sorted(set(keys.values())) or None


def _join_variants(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Where a value has become a section, or one of another kind, tell the whole ones apart, in place."""
    for holder in unions():
        of_both = [[key for key in values if f"{key}.".startswith(f"{holder}.")] for values in (old, new)]
        if set(of_both[0]) == set(of_both[1]):
            continue
        for values, keys in zip((old, new), of_both, strict=True):
            parts = {key.removeprefix(f"{holder}."): values.pop(key) for key in keys}
            if parts:
                values[holder] = parts.get(holder, parts)


def _drop_rate_is_followed(e: Experiment) -> bool:
    """Whether a coefficient of a loss follows the drop rate, which in a dropless run is the would-be one."""
    if e.moe is None:
        return False
    losses, z_loss = e.moe.moe_aux_loss_coeff, e.moe.moe_z_loss_coeff
    coefficients = [*losses, z_loss] if isinstance(losses, list) else [losses, z_loss]
    return any(isinstance(coefficient, AdaptiveCoefficient) for coefficient in coefficients)


def _rank(key: str) -> tuple[int, str]:
    order = list(known_keys())
    known = schema_key(key)
    return (order.index(known) if known in order else len(order), key)


def _follows(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the schedule spanned the whole run and still does, the warm-up being the same part of it; the
    final decay of WSD lies at the end, wherever that is."""
    if key.removeprefix("optimizer.") not in _FOLLOWS_TRAIN_ITERS:
        return False
    whole = all(
        values.get("optimizer.lr_decay_iters") == values.get("training.train_iters") for values in (old, new)
    )
    if key != "optimizer.lr_warmup_iters":
        return whole
    fraction = "optimizer.lr_warmup_fraction"
    return whole and new.get(fraction) is not None and old.get(fraction) == new.get(fraction)
