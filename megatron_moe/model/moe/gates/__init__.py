"""All gates, by their name in `moe.moe_router_gate`."""

from __future__ import annotations

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.gates.forced_balance import ForcedBalance
from megatron_moe.model.moe.gates.gate import Gate
from megatron_moe.model.moe.gates.gshard import GShard
from megatron_moe.model.moe.gates.hash import Hash
from megatron_moe.model.moe.gates.noisy_topk import NoisyTopK
from megatron_moe.model.moe.gates.sinkhorn import Sinkhorn
from megatron_moe.model.moe.gates.swipe import Swipe
from megatron_moe.model.moe.gates.switch import Switch
from megatron_moe.model.moe.gates.topk import TopK

GATES: dict[str, type[Gate]] = {
    "topk": TopK,
    "noisy_topk": NoisyTopK,
    "switch": Switch,
    "gshard": GShard,
    "sinkhorn": Sinkhorn,
    "swipe": Swipe,
    "hash": Hash,
    "forced_balance": ForcedBalance,
}


def needs_marks(moe: MoE) -> bool:
    """Whether routers look at more of a token than its hidden state, so that marks must travel with it (see
    `model.moe.marks`)."""
    return GATES[moe.moe_router_gate].needs_marks or bool(moe.moe_input_jitter_eps)
