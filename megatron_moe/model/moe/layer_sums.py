"""What routers did, from the rows of their statistics: sums over microbatches."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.capacity import capacity
from megatron_moe.model.moe.statistics import NUMBERS

COLUMNS = (
    "microbatches",
    "assigned",
    "dropped",
    "would_drop",
    "aux_loss",
    "z_loss",
    "entropy",
    "top1",
    "top2",
    "top3",
    "tokens",
    "not_finite",
)
"""Beside the load of each expert: see `training.moe_sums.MoESums`."""


def layer_sums(rows: Tensor, moe: MoE) -> Tensor:
    """[layers, e + len(COLUMNS)] from the rows [layers, m, width] of their microbatches (see
    `model.moe.statistics`)."""
    e, k = moe.num_moe_experts, moe.moe_router_topk
    routed, kept, scores, numbers = rows.split([e, e, e, len(NUMBERS)], dim=-1)
    number = dict(zip(NUMBERS, numbers.unbind(-1), strict=True))
    tokens = number["tokens"]
    tokens_or_one = tokens.clamp(min=1.0)
    limit = torch.as_tensor(capacity(tokens, k, e, moe.moe_would_drop_capacity_factor))
    columns = {
        "microbatches": torch.ones_like(tokens),
        "assigned": routed.sum(-1),
        "dropped": (routed - kept).sum(-1),
        "would_drop": (routed - limit.unsqueeze(-1)).clamp(min=0).sum(-1),
        # Switch Transformer, eq. 4, with f the fraction of assignments: e * sum_j f_j P_j.
        "aux_loss": e * (routed * scores).sum(-1) / (k * tokens_or_one.square()),
        "z_loss": number["z_squares"] / tokens_or_one,
        **{name: number[name] for name in COLUMNS if name in number},
    }
    of_microbatches = torch.stack([columns[name] for name in COLUMNS], dim=-1)
    return torch.cat([routed, of_microbatches], dim=-1).sum(1)
