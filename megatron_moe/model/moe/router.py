"""Megatron-Core's top-k router behind our class: padding, drops that don't depend on the layout,
statistics."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_moe.model.moe.capacity import sequence_order, within_capacity
from megatron_moe.model.moe.statistics import RoutingStatistics


class Router(TopKRouter):
    """Chooses k experts for each token.

    Built where Megatron-Core's MoESubmodules have `router`. Selection, gate weights and losses are
    Megatron-Core's; ours are:

    - the padding mask reaches it on every pipeline stage and under sequence parallelism (Megatron-Core shards
      it only on the first stage); true means padding, as in Megatron-Core's code, not its docstrings;
    - the z-loss of a microbatch with padding does not depend on the layout;
    - with a capacity factor the drops are decided over the replica's whole microbatch in the order of its
      tokens, so that the layout does not change them (Megatron-Core decides over each rank's tokens);
    - what was routed and dropped is counted, once a microbatch, also under recompute.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        # The loss a token is made in another way (engine.schedule.mean_targets): this one would divide the
        # routers' losses, means over microbatches, by the tokens, and 0.16 scales them wrongly under TP.
        assert not config.calculate_per_token_loss
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
            padding_mask: [s, b], true where a token is padding; of this rank's tokens or of all tokens of its
                tensor-parallel group. Either all ranks of a microbatch have one, or none.

        Returns:
            gate weights [s * b, e] and the routing map [s * b, e] bool.
        """
        if padding_mask is not None:
            padding_mask = self._of_this_rank(padding_mask, logits.size(0))
        probs, routed = super().routing(logits, padding_mask=padding_mask, **kwargs)
        valid = None if padding_mask is None else ~padding_mask.reshape(-1)
        kept = routed
        if self.capacity_factor is not None:
            kept = self._within_capacity(probs, routed, valid, logits.shape)
            probs = probs * kept
        # Recompute runs this twice, first without gradients; evaluation never has them.
        if self.training and torch.is_grad_enabled():
            tokens = logits.view(-1, logits.size(-1))
            self.statistics.record(tokens, routed, kept, valid, sigmoid=self.score_function == "sigmoid")
        return probs, kept

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attach this rank's share of a microbatch's balancing loss; what is logged comes from
        `statistics`."""
        return moe_utils.MoEAuxLossAutoScaler.apply(activation, aux_loss)

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

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # Megatron-Core combines the map [t, e] with a mask [t].
        super()._apply_expert_bias(routing_map, None if padding_mask is None else padding_mask[:, None])

    def _of_this_rank(self, padding_mask: Tensor, length: int) -> Tensor:
        if padding_mask.size(0) == length:
            return padding_mask
        return padding_mask.chunk(self.tp_group.size(), dim=0)[self.tp_group.rank()]

    @torch.no_grad()
    def _within_capacity(
        self, probs: Tensor, routed: Tensor, valid: Tensor | None, shape: torch.Size
    ) -> Tensor:
        """[t, e] bool: the assignments that their expert has room for, among the tokens of all TP x CP
        ranks."""
        group = self.tp_cp_group
        # Row i of what the ranks hold one after the other is row order[i] of the microbatch.
        order = sequence_order(self.tp_group.size(), self.cp_group.size(), shape[0], shape[1], probs.device)
        from_ranks = order.argsort()
        kept = within_capacity(
            _all_gather(probs, group)[from_ranks],
            _all_gather(routed, group)[from_ranks],
            None if valid is None else _all_gather(valid, group)[from_ranks],
            self.topk,
            self.capacity_factor,
            self.config.moe_token_drop_policy,
        )
        mine = order[group.rank() * len(probs) : (group.rank() + 1) * len(probs)]
        return kept[mine]


def _all_gather(x: Tensor, group: Any) -> Tensor:
    """[n, ..] of each rank -> [ranks * n, ..]."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
