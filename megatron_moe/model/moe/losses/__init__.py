"""All balancing losses, by their name in `moe.moe_router_load_balancing_type`."""

from __future__ import annotations

from megatron_moe.model.moe.losses.aux_loss import aux_loss
from megatron_moe.model.moe.losses.communication_aux_loss import communication_aux_loss
from megatron_moe.model.moe.losses.device_aux_loss import device_aux_loss
from megatron_moe.model.moe.losses.global_aux_loss import global_aux_loss
from megatron_moe.model.moe.losses.gshard_aux_loss import gshard_aux_loss
from megatron_moe.model.moe.losses.importance_loss import importance_loss
from megatron_moe.model.moe.losses.load_loss import load_loss
from megatron_moe.model.moe.losses.loss import Loss
from megatron_moe.model.moe.losses.seq_aux_loss import seq_aux_loss
from megatron_moe.model.moe.losses.skywork_aux_loss import skywork_aux_loss

LOSSES: dict[str, Loss] = {
    "aux_loss": aux_loss,
    "seq_aux_loss": seq_aux_loss,
    "global_aux_loss": global_aux_loss,
    "skywork_aux_loss": skywork_aux_loss,
    "gshard_aux_loss": gshard_aux_loss,
    "importance_loss": importance_loss,
    "load_loss": load_loss,
    "device_aux_loss": device_aux_loss,
    "communication_aux_loss": communication_aux_loss,
}
