"""What every balancing loss is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.gates.gate import Choice
from megatron_moe.model.moe.microbatch import Microbatch
from megatron_moe.model.moe.routing import dense_map


@dataclass(frozen=True)
class LossInput:
    """What a loss may look at; all of it before drops.

    Attributes:
        logits: [t, e].
        choice: the gate's.
        microbatch: whose tokens these are; its `total` makes a loss the same in every layout.
        moe: the settings.
        previous_load: [e] assignments an expert in the previous global batch, zeros before the first; None
            where no loss asks for it.
    """

    logits: Tensor
    choice: Choice
    microbatch: Microbatch
    moe: MoE
    previous_load: Tensor | None = None

    @property
    def routed(self) -> Tensor:
        """[t, e] bool: assignments of valid tokens."""
        return self.microbatch.masked(dense_map(self.choice.experts, self.choice.chosen, self.logits.size(1)))


Loss = Callable[[LossInput], Tensor]
"""The value over the whole microbatch, without coefficient, on every rank; its gradient is that of this
rank's tokens."""
