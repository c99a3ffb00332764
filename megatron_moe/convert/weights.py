"""The weights of a model by name: what they are is said in `engine.weights`."""

from __future__ import annotations

from megatron_moe.engine.weights import Weight, Weights

__all__ = ["Weight", "Weights"]
