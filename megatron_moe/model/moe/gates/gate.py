"""What every gate is given and gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.draws import Draws
from megatron_moe.model.moe.microbatch import Microbatch


@dataclass(frozen=True)
class GateInput:
    """What a gate may look at.

    Attributes:
        hidden: [t, h] in the precision of the router.
        logits: [t, e] in the precision of the router.
        microbatch: whose tokens these are.
        bias: [e] expert bias that selection adds to the scores; None: none.
        draws: this layer's random numbers.
    """

    hidden: Tensor
    logits: Tensor
    microbatch: Microbatch
    bias: Tensor | None
    draws: Draws


@dataclass(frozen=True)
class Choice:
    """What a gate decides, before capacity.

    Attributes:
        experts: [t, k] int64, different ones for each token, the first choice first.
        weights: [t, k] gate weights, differentiable.
        scores: [t, e] each token's shares of the experts, adding up to 1, differentiable: what losses take.
        chosen: [t, k] bool, false where the gate left out a choice; None: nowhere.
        load: [t, e] differentiable probability that a token would choose an expert again, for the load loss;
            None for gates that draw no noise.
        first_choices_first: where experts have a limited capacity, the first choices of all tokens are seated
            before any second choice (GShard).
    """

    experts: Tensor
    weights: Tensor
    scores: Tensor
    chosen: Tensor | None = None
    load: Tensor | None = None
    first_choices_first: bool = False


class Gate(torch.nn.Module):
    """Chooses experts for tokens. One subclass a file, one line in `gates.GATES`.

    Args:
        moe: the settings.
        hidden_size: h.

    Attributes:
        takes_logits: whether the router has weights and computes logits. Else they are zeros.
        needs_marks: whether it looks at tokens' numbers in the vocabulary, or draws by their positions.
    """

    takes_logits = True
    needs_marks = False

    def __init__(self, moe: MoE, hidden_size: int) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, given: GateInput) -> Choice:
        """Choose; see `Choice`."""
        raise NotImplementedError
