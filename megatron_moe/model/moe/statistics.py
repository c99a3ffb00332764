"""What a router did in one iteration: sums a microbatch, from which every MoE metric is computed."""

from __future__ import annotations

import torch
from torch import Tensor


class RoutingStatistics:
    """Sums over the target tokens that this rank routed, one row a microbatch.

    A row holds: assignments an expert before drops [e], after drops [e], router probability an expert [e],
    then the sums of logsumexp(logits)^2, the largest and the second largest probability, and the number of
    tokens.
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
    def record(self, logits: Tensor, routed: Tensor, kept: Tensor, valid: Tensor | None) -> None:
        """Add one microbatch.

        Args:
            logits: [t, e].
            routed: [t, e] bool, experts chosen for each token.
            kept: [t, e] bool, what is left of `routed` after drops.
            valid: [t] bool, false for padding; None: every token counts.
        """
        if valid is not None:
            logits, routed, kept = logits[valid], routed[valid], kept[valid]
        logits = logits.double()
        probs = logits.softmax(dim=-1)
        best = probs.topk(min(2, self.num_experts), dim=-1).values.sum(dim=0)
        second = best[1] if self.num_experts > 1 else best.new_zeros(())
        extra = torch.stack(
            [logits.logsumexp(dim=-1).square().sum(), best[0], second, best.new_tensor(float(logits.size(0)))]
        )
        self.rows.append(torch.cat([routed.sum(0).double(), kept.sum(0).double(), probs.sum(0), extra]))

    def take(self) -> Tensor:
        """[microbatches, width] in float64; starts anew."""
        rows, self.rows = torch.stack(self.rows), []
        return rows
