"""The SWIPE gate: every worker gets its share of the tokens, overflow goes to those with room."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
from megatron_moe.model.moe.gates.selection import largest, weighed


class Swipe(Gate):
    """In training each token goes to the best experts whose workers have room; in evaluation to the best ones
    (after BaGuaLu, as FastMoE has it).

    Workers are moe_num_device_groups equal shares of the experts, by default one of each expert, and not the
    ranks that hold them, or the layout would decide where tokens go.
    """

    def __init__(self, moe: MoE, hidden_size: int) -> None:
        super().__init__(moe, hidden_size)
        self.workers = moe.moe_num_device_groups or moe.num_moe_experts

    def forward(self, given: GateInput) -> Choice:
        microbatch, logits = given.microbatch, given.logits
        experts = largest(self.moe, logits)
        if not self.training:
            return weighed(self.moe, logits, experts)
        valid = microbatch.valid
        decided = assign(
            microbatch.gather(logits.detach()),
            None if valid is None else microbatch.gather(valid),
            self.moe.moe_router_topk,
            self.workers,
        )
        assigned, chosen = (microbatch.mine(part) for part in decided)
        if valid is not None:
            # What is no target takes no room, and passes its best experts.
            assigned = torch.where(valid[:, None], assigned, experts)
            chosen = chosen | ~valid[:, None]
        return weighed(self.moe, logits, assigned, chosen)


def assign(values: Tensor, valid: Tensor | None, k: int, workers: int) -> tuple[Tensor, Tensor]:
    """Experts [t, k], different ones for each token, and [t, k] where the choice was made.

    A worker takes at most ceil(t * k / workers) assignments of the t valid tokens. First all tokens' first
    choices are made, then all second ones, ..: of those that choose a worker the first in the sequence get
    its room, the others choose again among the workers with room. A choice is not made where all workers with
    room have only experts that the token goes to already; that may befall a few last ones.

    Args:
        values: [t, e], larger ones are better, in the order of the sequence.
        valid: [t] bool; None: all.
    """
    tokens, experts = values.shape
    share = experts // workers
    # Beside minus infinity no expert would be better than those without room, and a token wait for ever.
    values = values.nan_to_num()
    waiting = valid if valid is not None else torch.ones(tokens, dtype=torch.bool, device=values.device)
    room = torch.full((workers,), -(-int(waiting.sum()) * k // workers), device=values.device)
    free = torch.ones_like(values, dtype=torch.bool)
    assigned, made = [], []
    for _ in range(k):
        # What no worker had room for is the best of the free ones.
        expert = values.masked_fill(~free, -torch.inf).argmax(1)
        left = waiting.clone()
        while bool(left.any()):
            possible = free & (room > 0).repeat_interleave(share)
            left &= possible.any(1)
            best = values.masked_fill(~possible, -torch.inf).argmax(1)
            wanted = torch.zeros(tokens, workers, dtype=torch.int64, device=values.device)
            wanted.scatter_(1, (best // share)[:, None], left[:, None].long())
            seated = (wanted.bool() & (wanted.cumsum(0) <= room)).any(1)
            expert = torch.where(seated, best, expert)
            room = room - (wanted * seated[:, None]).sum(0)
            left &= ~seated
            free_of_seated = free.scatter(1, best[:, None], False)
            free = torch.where(seated[:, None], free_of_seated, free)
        unseated = free.gather(1, expert[:, None]).squeeze(1)
        assigned.append(expert)
        made.append(~unseated)
        free = free.scatter(1, expert[:, None], False)
    return torch.stack(assigned, 1), torch.stack(made, 1)
