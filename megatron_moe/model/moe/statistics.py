"""What a router did in one iteration: sums a microbatch, from which every MoE metric is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_moe.model.moe.routing import Routing, dense_map

if TYPE_CHECKING:
    from megatron_moe.model.moe.gates.gate import Choice
    from megatron_moe.model.moe.microbatch import Microbatch


class RoutingStatistics:
    """Sums over the target tokens that this rank routed, one row a microbatch.

    A row holds: assignments an expert before drops [e], after drops [e], router score an expert [e], then the
    sums of logsumexp(logits)^2, the largest and the second largest score, and the number of tokens. A token's
    scores add up to 1: the softmax of its logits, or their sigmoids over the sigmoids' sum, as the balancing
    loss has them.
    """

    EXTRA = 4

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.rows: list[Tensor] = []

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return 3 * self.num_experts + self.EXTRA

    @torch.no_grad()
    def record(self, logits: Tensor, choice: Choice, routing: Routing, microbatch: Microbatch) -> None:
        """Add this rank's part of one microbatch.

        Args:
            logits: [t, e].
            choice: the gate's, before drops.
            routing: what is left of it.
            microbatch: padding does not count.
        """
        routed = dense_map(choice.experts, choice.chosen, self.num_experts)
        kept = routed if routing.kept is None else dense_map(routing.experts, routing.kept, self.num_experts)
        exact, scores = logits.double(), choice.scores.double()
        if microbatch.valid is not None:
            exact, scores, routed, kept = (x[microbatch.valid] for x in (exact, scores, routed, kept))
        best = scores.topk(min(2, self.num_experts), dim=-1).values.sum(dim=0)
        routed_sum = routed.sum(0, dtype=exact.dtype)
        row = [
            routed_sum,
            routed_sum if kept is routed else kept.sum(0, dtype=exact.dtype),
            scores.sum(0),
            exact.logsumexp(dim=-1).square().sum(0, keepdim=True),
            best if self.num_experts > 1 else torch.cat([best, torch.zeros_like(best)]),
            best.new_full((1,), exact.size(0)),
        ]
        self.rows.append(torch.cat(row))

    def take(self) -> Tensor:
        """[microbatches, width] in float64; starts anew. There must be a microbatch."""
        rows, self.rows = torch.stack(self.rows), []
        return rows
