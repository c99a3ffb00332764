"""All gates, by their name in `moe.moe_router_gate`."""

from __future__ import annotations

from megatron_moe.model.moe.gates.gate import Gate
from megatron_moe.model.moe.gates.topk import TopK

GATES: dict[str, type[Gate]] = {
    "topk": TopK,
}
