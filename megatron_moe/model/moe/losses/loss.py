"""What every balancing loss is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.gates.gate import Choice
from megatron_moe.model.moe.microbatch import Microbatch
from megatron_moe.model.moe.routing import dense_map


@dataclass(frozen=True)
class LossInput:
    """What a loss may look at; all of it before drops.

    Attributes:
        logits: [t, e], as the router computed them.
        choice: the gate's.
        microbatch: whose tokens these are; its `total` makes a loss the same in every layout.
        moe: the settings.
        previous_fractions: [e] each expert's share of the previous global batch's assignments, 1/e before the
            first; None where no loss asks for it.
        mean_tokens: [] valid tokens of the global batch over its microbatches; None: as many as this
            microbatch has.
    """

    logits: Tensor
    choice: Choice
    microbatch: Microbatch
    moe: MoE
    previous_fractions: Tensor | None = None
    mean_tokens: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """e."""
        return self.logits.size(1)

    @property
    def routed(self) -> Tensor:
        """[t, e] bool: assignments of valid tokens."""
        return self.microbatch.masked(dense_map(self.choice.experts, self.choice.chosen, self.num_experts))

    @cached_property
    def fractions(self) -> Tensor:
        """[e] each expert's share of the t * k assignments of the microbatch. Passes no gradient."""
        assigned = self.microbatch.sum(self.routed.sum(0, dtype=self.choice.scores.dtype))
        return assigned / (self.microbatch.count * self.moe.moe_router_topk)

    @cached_property
    def score_sums(self) -> Tensor:
        """[e] sum over the valid tokens of each expert's score."""
        return self.microbatch.total(self.microbatch.masked(self.choice.scores).sum(0))

    @property
    def mean_scores(self) -> Tensor:
        """[e] mean over the valid tokens of each expert's score."""
        return self.score_sums / self.microbatch.count


Loss = Callable[[LossInput], Tensor]
"""The value over the whole microbatch, without coefficient, on every rank; its gradient is that of this
rank's tokens."""
