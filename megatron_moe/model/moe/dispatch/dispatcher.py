"""What every dispatcher is given and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_moe.model.moe.permutation import Permutation
from megatron_moe.model.moe.routing import Routing

Experts = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]
"""This rank's experts: tokens [n, h] sorted by local expert, how many each gets [local experts], gate weights
[n] -> [n, h], each row times its weight."""


@runtime_checkable
class SortingExperts(Protocol):
    """Experts that take tokens as they come, and need no sorted copies of them."""

    def of_unsorted(self, tokens: Tensor, permutation: Permutation, probs: Tensor) -> Tensor:
        """[t, h] -> [t, h], the sum of what each token's experts make of it.

        Args:
            tokens: [t, h].
            permutation: which expert gets which tokens.
            probs: [n] gate weights of the sorted rows.
        """
        ...


class Pending(Protocol):
    """Rows on their way."""

    def wait(self) -> Tensor:
        """Those that came, the ones of rank 0 first. To be called once."""
        ...


Start = Callable[[Tensor, list[int], list[int]], Pending]
"""Sends rows to the expert ranks: rows [n, ..], those for rank 0 first; how many each rank gets; how many
each rank sends here."""


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
