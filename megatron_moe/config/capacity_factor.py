"""What a capacity factor says."""

from __future__ import annotations

from typing import Literal

CapacityFactor = float | Literal["auto"] | None
"""As `moe.moe_expert_capacity_factor`."""


def limit(factor: CapacityFactor) -> float | None:
    """The factor beyond which assignments are dropped; None: none is, whatever comes."""
    return None if factor is None or factor == "auto" or factor == 0 else abs(factor)
