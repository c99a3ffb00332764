"""What differs between the supported versions of Megatron-Core (0.16.1 to 0.19), in one place."""

from __future__ import annotations

import functools
from typing import Any


def moe_submodules(mlp: Any) -> Any:
    """The MoESubmodules inside a MoE layer spec: a ModuleSpec in 0.16, a `functools.partial` of the layer class in 0.19."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def repair_missing_transformer_engine() -> None:
    """0.16.1 names `te_general_gemm` in the router's gating also where Transformer Engine is not installed: NameError."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
