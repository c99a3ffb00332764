"""Which weights `training.freeze` means: groups by name, and shell patterns of names in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

GROUPS: dict[str, tuple[str, ...]] = {
    "router": ("*.mlp.router.*",),
    "experts": ("*.mlp.experts.*",),
    "shared_experts": ("*.mlp.shared_experts.*",),
    "mlp": ("*.mlp.linear_fc?.weight", "*.mlp.linear_fc?.bias"),
    "attention": ("*.self_attention.*",),
    "norms": (),
    "embeddings": ("embedding.*",),
    "output": ("output_layer.*",),
}
"""Each group's patterns. Norms are told by `is_norm`, and belong to no other group, wherever they stand."""


def is_norm(name: str) -> bool:
    """Whether a weight is a norm's: `decoder.final_layernorm.weight`, `.. linear_qkv.layer_norm_weight`."""
    return "layer_norm_" in name or name.rpartition(".")[0].endswith("norm")


def means(entry: str, name: str) -> bool:
    """Whether an entry of `training.freeze` means the weight of this name, which is without a number of an
    expert: `decoder.layers.3.mlp.experts.linear_fc1.weight`."""
    if entry == "norms":
        return is_norm(name)
    if entry in GROUPS:
        return not is_norm(name) and any(fnmatchcase(name, pattern) for pattern in GROUPS[entry])
    return fnmatchcase(name, entry)


def is_frozen(freeze: Sequence[str], name: str) -> bool:
    """Whether any entry means it."""
    return any(means(entry, name) for entry in freeze)


def is_adapter(name: str) -> bool:
    """Whether a weight is one that `training.lora` adds."""
    return name.endswith((".lora_a", ".lora_b"))
