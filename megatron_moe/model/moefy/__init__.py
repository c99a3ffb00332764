"""Someone's own model, its feed-forward layers made mixtures of experts."""

from __future__ import annotations

from megatron_moe.model.moefy.replace import moefy

__all__ = ["moefy"]
