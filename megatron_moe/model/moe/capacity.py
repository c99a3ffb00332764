"""Which assignments an expert of limited capacity keeps, the same in every layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_moe.config.capacity_factor import CapacityFactor, limit
from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.groups import MoEGroups, size
from megatron_moe.model.moe.routing import Padded, Routing

if TYPE_CHECKING:
    from megatron_moe.model.moe.gates.gate import Choice
    from megatron_moe.model.moe.microbatch import Microbatch


def capacity(tokens: float | Tensor, topk: int, num_experts: int, factor: float) -> float | Tensor:
    """ceil(t * k / e * factor): what an expert takes of t tokens, and never more than all of them."""
    if isinstance(tokens, Tensor):
        return torch.minimum(tokens, tokens * topk / num_experts * factor).ceil()
    return math.ceil(min(tokens, tokens * topk / num_experts * factor))


class Capacity:
    """Turns a gate's choice into what is kept of it.

    Args:
        moe: the settings.
    """

    def __init__(self, moe: MoE) -> None:
        self.moe = moe
        self.in_training: CapacityFactor = moe.moe_expert_capacity_factor
        self.in_evaluation: CapacityFactor = moe.moe_eval_capacity_factor
        if self.in_evaluation is None:
            self.in_evaluation = self.in_training

    def drops(self, training: bool) -> bool:
        """Whether anything may be dropped."""
        return limit(self.in_training if training else self.in_evaluation) is not None

    def apply(self, choice: Choice, microbatch: Microbatch, training: bool) -> Routing:
        """The routing of this rank's tokens, decided over the whole microbatch."""
        setting = self.in_training if training else self.in_evaluation
        kept = self._kept(choice, microbatch, limit(setting))
        weights = choice.weights if kept is None else choice.weights.masked_fill(~kept, 0)
        return Routing(choice.experts, weights, kept, self._padded(microbatch, setting))

    @torch.no_grad()
    def _kept(self, choice: Choice, microbatch: Microbatch, factor: float | None) -> Tensor | None:
        """[t, k] bool: the assignments that were made and that their expert has room for; None: all.

        Tokens that are padding are left out of the account: they take no room, and are never dropped (a
        prompt that is no target must still pass its experts).
        """
        if factor is None:
            return choice.chosen
        experts, k, whole = choice.experts, choice.experts.size(1), self.moe.num_moe_experts
        contending = torch.ones_like(experts, dtype=torch.bool) if choice.chosen is None else choice.chosen
        contending = microbatch.masked(contending)
        # One exchange instead of two: expert numbers are exact in every precision of a router.
        numbers = experts.masked_fill(~contending, whole).to(choice.weights.dtype)
        given = microbatch.gather(torch.cat([numbers, choice.weights.detach() * contending], dim=1))
        room = capacity(microbatch.count.double(), k, whole, factor)
        policy, ahead = self.moe.moe_token_drop_policy, choice.first_choices_first
        seats = places(given[:, :k].long(), given[:, k:], whole, policy, ahead)
        kept = (microbatch.mine(seats) < room) | ~contending
        return kept if choice.chosen is None else kept & choice.chosen

    def _padded(self, microbatch: Microbatch, setting: CapacityFactor) -> Padded | None:
        moe, groups = self.moe, microbatch.groups
        if not moe.moe_pad_expert_input_to_capacity:
            return None
        factor = limit(setting)
        if factor is None or factor != setting:  # `auto`, 0 and negative ones: what the fullest expert needs
            return Padded(0, at_least=True)
        tokens = microbatch.length * microbatch.batch * size(groups.microbatch)
        rows = capacity(tokens, moe.moe_router_topk, moe.num_moe_experts, factor)
        return Padded(int(rows) * replicas_reached(groups), at_least=microbatch.valid is not None)


def places(
    experts: Tensor, weights: Tensor, num_experts: int, policy: str, first_choices_first: bool
) -> Tensor:
    """[t, k] int64: the place of each assignment in its expert's queue, from 0.

    Args:
        experts: [t, k] expert numbers, in the order of the sequence; `num_experts` where there is none.
        weights: [t, k] gate weights.
        policy: `probs` lets the largest gate weights in first, of equal ones the earlier tokens; `position`
            the earlier tokens; `batch_priority` all first choices, those of the tokens whose largest weight
            is largest first, then all second ones (V-MoE, section 3.4: batch prioritized routing).
        first_choices_first: all first choices before all second ones, within each as `policy` says.
    """
    order = _by_priority(weights, policy, first_choices_first)
    flat = experts.reshape(-1)
    by_expert, within = (flat if order is None else flat[order]).sort(stable=True)
    starts = torch.searchsorted(by_expert, torch.arange(num_experts + 1, device=flat.device))
    place = torch.arange(len(flat), device=flat.device) - starts[by_expert]
    result = torch.empty_like(flat)
    result[within if order is None else order[within]] = place
    return result.view_as(experts)


def _by_priority(weights: Tensor, policy: str, first_choices_first: bool) -> Tensor | None:
    """[t * k] places in the flattened [t, k], those that are let in first at first; None: as they stand."""
    tokens, k = weights.shape
    choices = torch.arange(k, device=weights.device)[:, None]
    if policy == "batch_priority":
        best = weights.amax(dim=1).argsort(descending=True, stable=True)
        return (best * k + choices).flatten()
    if policy == "probs" and first_choices_first:
        return (weights.T.argsort(dim=1, descending=True, stable=True) * k + choices).flatten()
    if policy == "probs":
        return weights.flatten().argsort(descending=True, stable=True)
    if first_choices_first:
        return (torch.arange(tokens, device=weights.device) * k + choices).flatten()
    return None


def replicas_reached(groups: MoEGroups) -> int:
    """Microbatches whose tokens may reach the experts of one rank, at most: the replicas that the ranks of
    ETP x EP lie in, which are numbered one after the other as those of TP x CP."""
    of_experts = size(groups.expert_ranks)
    of_replica = size(groups.tensor) * size(groups.context)
    # A block of expert ranks begins at a multiple of their common divisor within a replica.
    return -((math.gcd(of_experts, of_replica) - of_experts) // of_replica) + 1
