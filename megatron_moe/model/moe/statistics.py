"""What a router did in one iteration: sums a microbatch, from which every MoE metric is computed."""

from __future__ import annotations

import torch
from torch import Tensor


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
    def record(
        self, logits: Tensor, routed: Tensor, kept: Tensor, valid: Tensor | None, sigmoid: bool = False
    ) -> None:
        """Add one microbatch.

        Args:
            logits: [t, e].
            routed: [t, e] bool, experts chosen for each token.
            kept: [t, e] bool, what is left of `routed` after drops.
            valid: [t] bool, false for padding; None: every token counts.
            sigmoid: the scores are sigmoids, not a softmax.
        """
        if valid is not None:
            logits, routed, kept = logits[valid], routed[valid], kept[valid]
        exact = logits.double()
        log_sum = exact.logsumexp(dim=-1, keepdim=True)
        # The softmax, at a third of the price of torch's own, which is slow on the host over few experts.
        scores = _shares(exact.sigmoid()) if sigmoid else (exact - log_sum).exp()
        best = scores.topk(min(2, self.num_experts), dim=-1).values.sum(dim=0)
        routed_sum = routed.sum(0, dtype=exact.dtype)
        row = [
            routed_sum,
            routed_sum if kept is routed else kept.sum(0, dtype=exact.dtype),
            scores.sum(0),
            log_sum.square().sum(0),
            best if self.num_experts > 1 else torch.cat([best, torch.zeros_like(best)]),
            best.new_full((1,), logits.size(0)),
        ]
        self.rows.append(torch.cat(row))

    def take(self) -> Tensor:
        """[microbatches, width] in float64; starts anew. There must be a microbatch."""
        rows, self.rows = torch.stack(self.rows), []
        return rows


def _shares(scores: Tensor) -> Tensor:
    """[t, e], each token's divided by their sum."""
    return scores / scores.sum(dim=-1, keepdim=True)
