"""All balancing losses, by their name in `moe.moe_router_load_balancing_type`."""

from __future__ import annotations

from megatron_moe.model.moe.losses.aux_loss import aux_loss
from megatron_moe.model.moe.losses.loss import Loss

LOSSES: dict[str, Loss] = {
    "aux_loss": aux_loss,
}
