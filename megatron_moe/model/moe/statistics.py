"""What a router did in one iteration: sums a microbatch, from which every MoE metric is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_moe.model.moe.routing import Routing, expert_counts

if TYPE_CHECKING:
    from megatron_moe.model.moe.gates.gate import Choice
    from megatron_moe.model.moe.microbatch import Microbatch

NUMBERS = ("z_squares", "entropy", "top1", "top2", "top3", "tokens", "not_finite")


class RoutingStatistics:
    """Sums over the target tokens that this rank routed, one row a microbatch, in float64.

    A row holds: assignments an expert before drops [e], after drops [e], score an expert [e], then `NUMBERS`:
    the sums of logsumexp(logits)^2 (NaN for a gate without logits), of the scores' entropy in nats, of the
    largest, second and third largest score, the number of tokens, and 1 where a logit of any token, padding
    included, is not finite. A token's scores add up to 1 (see `gates.gate.Choice`).

    Whoever trains takes the rows in every iteration: they are kept until then.

    Attributes:
        dropped: [2] float64, assignments made and dropped in evaluation, since they were last taken; None
            where nothing is dropped in it.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.rows: list[Tensor] = []
        self.dropped: Tensor | None = None

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return 3 * self.num_experts + len(NUMBERS)

    @torch.no_grad()
    def record(self, logits: Tensor | None, choice: Choice, routing: Routing, microbatch: Microbatch) -> None:
        """Add this rank's part of one microbatch. Nothing here waits for the device.

        Args:
            logits: [t, e]; None for a gate without.
            choice: the gate's, before drops.
            routing: what is left of it.
            microbatch: padding does not count.
        """
        scores = microbatch.masked(choice.scores)
        tokens = scores.new_full((), len(scores), dtype=torch.float64)
        if microbatch.valid is not None:
            tokens = microbatch.valid.sum(dtype=torch.float64)
        numbers = [_z_squares(logits, microbatch), _entropy(scores), *_largest(scores, 3), tokens]
        broken = torch.zeros_like(tokens)
        if logits is not None:
            broken = logits.sum().isfinite().logical_not().double()
        routed, kept = self._assigned(choice.chosen, routing, microbatch)
        self.rows.append(
            torch.cat([routed, kept, scores.sum(0, dtype=torch.float64), torch.stack([*numbers, broken])])
        )

    @torch.no_grad()
    def record_drops(self, choice: Choice, routing: Routing, microbatch: Microbatch) -> None:
        """Add what was dropped of one microbatch in evaluation."""
        routed, kept = (counts.sum() for counts in self._assigned(choice.chosen, routing, microbatch))
        row = torch.stack([routed, routed - kept])
        self.dropped = row if self.dropped is None else self.dropped + row

    def take(self) -> Tensor:
        """[microbatches, width]; starts anew. There must be a microbatch."""
        rows, self.rows = torch.stack(self.rows), []
        return rows

    def take_dropped(self) -> Tensor | None:
        """`dropped`; starts anew."""
        dropped, self.dropped = self.dropped, None
        return dropped

    def _assigned(
        self, chosen: Tensor | None, routing: Routing, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor]:
        """[e] assignments of target tokens to each expert, before and after drops."""
        counts = []
        for which in (chosen, routing.kept):
            if microbatch.valid is not None:
                valid = microbatch.valid[:, None]
                which = valid.expand_as(routing.experts) if which is None else which & valid
            counts.append(expert_counts(routing.experts, which, self.num_experts))
        return counts[0], counts[1]


def _z_squares(logits: Tensor | None, microbatch: Microbatch) -> Tensor:
    if logits is None:
        return torch.full((), torch.nan, dtype=torch.float64, device=microbatch.device)
    return microbatch.masked(logits.logsumexp(dim=-1).square()).sum(dtype=torch.float64)


def _entropy(scores: Tensor) -> Tensor:
    """- sum over tokens and experts of p log p; a score of 0 adds nothing."""
    logarithms = scores.clamp(min=torch.finfo(scores.dtype).tiny).log_()
    return -torch.linalg.vecdot(scores, logarithms).sum(dtype=torch.float64)


def _largest(scores: Tensor, count: int) -> list[Tensor]:
    """Sums over the tokens of the largest score, the second largest, .. `count` of them; 0 where there are
    not so many. Cheaper than `topk`."""
    rest = scores.clone()
    sums: list[Tensor] = []
    for index in range(count):
        if index >= scores.size(1):
            sums.append(torch.zeros_like(sums[0]))
            continue
        values, places = rest.max(dim=1, keepdim=True)
        sums.append(values.sum(dtype=torch.float64))
        rest.scatter_(1, places, -1)
    return sums
