"""Megatron-Core's top-k router behind our class: padding, drops that don't depend on the layout,
statistics."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_moe.model.moe.statistics import RoutingStatistics


class Router(TopKRouter):
    """Chooses k experts for each token.

    Built where Megatron-Core's MoESubmodules have `router`. Selection, gate weights and losses are
    Megatron-Core's; ours are:

    - the padding mask reaches it on every pipeline stage and under sequence parallelism (Megatron-Core shards
      it only on the first stage);
    - the z-loss of a microbatch with padding does not depend on the layout;
    - with a capacity factor the drops are decided over the replica's whole microbatch, so that the layout
      does not change them (Megatron-Core decides over each rank's tokens);
    - what was routed and dropped is counted, once a microbatch, also under recompute.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        self.capacity_factor = config.moe_expert_capacity_factor
        without_drops = copy.copy(config)
        without_drops.moe_expert_capacity_factor = None
        super().__init__(config=without_drops, pg_collection=pg_collection, **kwargs)
        self.statistics = RoutingStatistics(config.num_moe_experts)

    def routing(
        self, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Args:
            logits: [s, b, e] of this rank's tokens.
            padding_mask: [s, b], true where a token is padding; of this rank's tokens or of the whole
                microbatch.

        Returns:
            gate weights [s * b, e] and the routing map [s * b, e] bool.
        """
        if padding_mask is not None:
            padding_mask = self._of_this_rank(padding_mask, logits.size(0))
        probs, routed = super().routing(logits, padding_mask=padding_mask, **kwargs)
        kept = routed
        if self.capacity_factor is not None:
            kept = self._within_capacity(probs, routed)
            probs = probs * kept
        # Recompute runs this twice, first without gradients; evaluation never has them.
        if self.training and torch.is_grad_enabled():
            valid = None if padding_mask is None else ~padding_mask.reshape(-1)
            self.statistics.record(logits.view(-1, logits.size(-1)), routed, kept, valid)
        return probs, kept

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss coeff * mean(logsumexp(logits)^2) (ST-MoE, eq. 5) over the tokens of all TP x CP
        ranks.

        Megatron-Core takes the mean of each rank's mean, so that padding on one rank weighs its tokens more.

        Args:
            logits: [t, e].
            padding_mask: [t], true where a token is padding.
        """
        if not self.config.moe_z_loss_coeff or not self.training or not torch.is_grad_enabled():
            return logits
        squares = logits.logsumexp(dim=-1).square()
        count = torch.tensor(float(logits.size(0) * self.tp_cp_group.size()), device=logits.device)
        if padding_mask is not None:
            squares = squares.masked_fill(padding_mask, 0.0)
            count = (~padding_mask).sum().float()
            torch.distributed.all_reduce(count, group=self.tp_cp_group)
        loss = self.config.moe_z_loss_coeff * squares.sum() / count.clamp(min=1.0)
        return moe_utils.MoEAuxLossAutoScaler.apply(logits, loss)

    def _of_this_rank(self, padding_mask: Tensor, length: int) -> Tensor:
        if padding_mask.size(0) == length:
            return padding_mask
        return padding_mask.chunk(self.tp_group.size(), dim=0)[self.tp_group.rank()]

    @torch.no_grad()
    def _within_capacity(self, probs: Tensor, routed: Tensor) -> Tensor:
        """[t, e] bool: the assignments that their expert still has room for, over the tokens of all TP x CP
        ranks."""
        group = self.tp_cp_group
        mine = slice(group.rank() * probs.size(0), (group.rank() + 1) * probs.size(0))
        gathered = moe_utils.apply_router_token_dropping(
            _all_gather(probs, group),
            _all_gather(routed, group),
            router_topk=self.topk,
            capacity_factor=self.capacity_factor,
            drop_policy=self.config.moe_token_drop_policy,
            pad_to_capacity=False,
        )[1]
        return gathered[mine].bool()


def _all_gather(x: Tensor, group: Any) -> Tensor:
    """[n, ..] of each rank -> [ranks * n, ..]."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
