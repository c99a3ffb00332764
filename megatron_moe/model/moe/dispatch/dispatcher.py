"""What every dispatcher is given and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megatron_moe.model.moe.routing import Routing

Experts = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]
"""This rank's experts: tokens [n, h] sorted by local expert, how many each gets [local experts], gate weights
[n] -> [n, h], each row times its weight."""


class Dispatcher(Protocol):
    """Brings tokens to their experts and what these make of them back."""

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: Experts,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Args:
            tokens: [t, h] of this rank.
            routing: of these tokens.
            experts: of this rank.
            meanwhile: computed while tokens travel, [t, h].

        Returns:
            [t, h], the sum over each token's experts, plus what `meanwhile` gives.
        """
        ...
