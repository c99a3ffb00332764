"""Rules about rotary positions that are stretched to longer sequences."""

from __future__ import annotations

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Experiment, RotaryScaling

_SCALING = "model.rotary_scaling"
_LENGTH = f"{_SCALING}.original_max_position_embeddings"

READ_BY: dict[str, tuple[str, ...]] = {
    "original_max_position_embeddings": ("llama3", "yarn"),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "truncate": ("yarn",),
    "attention_factor": ("yarn",),
}
"""Keys that not every kind reads, and the kinds that do."""

_ORDERED = {"llama3": ("high_freq_factor", "low_freq_factor"), "yarn": ("beta_fast", "beta_slow")}
"""Where a frequency stays as it is, and where it is slowed down by the whole factor: it turns less often."""


def keys_of_rotary_scaling(e: Experiment) -> Problems:
    """What a kind does not read is left at its default; what it needs is there."""
    scaling = e.model.rotary_scaling
    if scaling is None:
        return
    kind = f"{_SCALING}.kind"
    for name, kinds in READ_BY.items():
        is_set = getattr(scaling, name) != RotaryScaling.model_fields[name].default
        if is_set and scaling.kind not in kinds:
            text = f"has no effect under {kind}"
            yield Problem(
                (f"{_SCALING}.{name}", kind), text, f"use {kind} {' or '.join(kinds)}, or leave it out"
            )
    if scaling.original_max_position_embeddings is None and scaling.kind != "linear":
        yield Problem(
            (_LENGTH, kind), f"is missing, and {kind} needs it", "say how long sequences were before"
        )


def rotary_scaling_can_be_computed(e: Experiment) -> Problems:
    """Kinds stretch rotary positions, of a whole head where they sharpen scores, from fast to slow ones."""
    scaling = e.model.rotary_scaling
    if scaling is None:
        return
    if e.model.position_embedding_type != "rope":
        key = "model.position_embedding_type"
        yield Problem((_SCALING, key), f"has no effect on positions other than rope in {key}", "leave it out")
    if (ordered := _ORDERED.get(scaling.kind)) is not None:
        fast, slow = (getattr(scaling, name) for name in ordered)
        if fast <= slow:
            keys = tuple(f"{_SCALING}.{name}" for name in ordered)
            yield Problem(keys, f"is not more than {keys[1]}", f"use more than {slow}")
    if scaling.kind != "yarn":
        return
    if e.model.rotary_percent != 1.0:
        part = "model.rotary_percent"
        text = "does not sharpen scores of which only a part is rotated"
        yield Problem((f"{_SCALING}.kind", part), text, f"set {part} to 1, or use another kind")
    if e.model.rotary_base <= 1.0:
        base = "model.rotary_base"
        yield Problem((base, f"{_SCALING}.kind"), "is not more than 1, as yarn needs it", "use 10000")
