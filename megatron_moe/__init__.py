"""A trainer for Mixture-of-Experts language models on Megatron-Core; its MoE layer, for any PyTorch program.

What stands in `_LIBRARY` is imported when it is first used: `import megatron_moe` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_moe.config.errors import InputError, RunError
    from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
    from megatron_moe.model.moe.iteration import (
        aux_loss,
        end_iteration,
        mixtures,
        scale_losses,
        statistics,
        telling,
    )
    from megatron_moe.model.moe.layer import MixtureOfExperts
    from megatron_moe.model.moe.mixture import MultiGateMixture
    from megatron_moe.model.moe.parallel import average_gradients, expert_groups, keep_from_ddp
    from megatron_moe.model.moefy import moefy

__version__ = "0.1.0"

_LIBRARY = {
    "megatron_moe.config.errors": ("InputError", "RunError"),
    "megatron_moe.model.moe.gates.gate": ("Choice", "Gate", "GateInput"),
    "megatron_moe.model.moe.iteration": (
        "aux_loss",
        "end_iteration",
        "mixtures",
        "scale_losses",
        "statistics",
        "telling",
    ),
    "megatron_moe.model.moe.layer": ("MixtureOfExperts",),
    "megatron_moe.model.moe.mixture": ("MultiGateMixture",),
    "megatron_moe.model.moe.parallel": ("average_gradients", "expert_groups", "keep_from_ddp"),
    "megatron_moe.model.moefy": ("moefy",),
}

__all__ = [
    "Choice",
    "Gate",
    "GateInput",
    "InputError",
    "MixtureOfExperts",
    "MultiGateMixture",
    "RunError",
    "aux_loss",
    "average_gradients",
    "end_iteration",
    "expert_groups",
    "keep_from_ddp",
    "mixtures",
    "moefy",
    "scale_losses",
    "statistics",
    "telling",
]


def __getattr__(name: str) -> Any:
    for module, names in _LIBRARY.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'megatron_moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
