"""Skywork-MoE: Mixtral's weights, with normalized gating logits (Skywork-MoE report, eq. 6).

The published config.json counts experts in a list, and names what the router does; their inference code takes
the two best of a softmax over logits times moe_gate_norm_std / std, and divides them by their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import read_transformer, write_transformer
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.families.mixtral import NAMES
from megatron_moe.convert.family import Family, Json, NotOfFamily
from megatron_moe.convert.moe_config import mixture_of, read_balance, write_balance
from megatron_moe.convert.transformer_weights import FREQUENCIES, attention, mixture, transformer

_TOPK = 2


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_transformer(given, epsilon=1e-6)
    given.require("sliding_window", None, "is a window, which this family does not have")
    given.require("moe_expert_interval", 1, "would leave layers dense")
    given.require("moe_2layer_gate", False, "would be a router of two layers")
    for gating in ("moe_use_skywork_gating", "moe_use_Skywork_gating"):
        given.get(
            gating, default=None
        )  # the softmax is over all or over the chosen: divided by the sum the same
    if not given.get("moe_use_mixtral_gating", default=False):
        given.require("moe_feature_no_mul_topk", True, "would double what experts get")
    given.get("moe_feature_no_mul_topk", default=None)
    moe = {
        "num_moe_experts": _experts(given),
        "moe_router_topk": given.get("num_experts_per_tok", default=_TOPK),
        "moe_ffn_hidden_size": model["ffn_hidden_size"],
        **read_balance(given.get("router_aux_loss_coef", default=0.001)),
    }
    deviation = given.get("moe_gate_norm_std", default=1.0)
    if given.get("moe_use_logits_norm", default=False):
        moe["moe_router_logit_normalization"] = deviation
    given.finish()
    return {"model": model, "moe": moe}


def _experts(given: ConfigJson) -> int:
    """`num_experts: [16]`, or as Mixtral."""
    counts = given.get("num_experts", default=None)
    if counts is None:
        counts = given.get("num_local_experts", default=0)
    if isinstance(counts, list) and len(counts) == 1:
        counts = counts[0]
    if not isinstance(counts, int) or counts < 1:
        raise NotOfFamily(
            "num_experts: missing, or no list of one number; without experts this is no Skywork-MoE"
        )
    return counts


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    moe = mixture_of(e)
    deviation = moe.moe_router_logit_normalization
    gating = {} if deviation is None else {"moe_use_logits_norm": True, "moe_gate_norm_std": deviation}
    return {
        "model_type": "skywork",
        **write_transformer(e),
        "intermediate_size": moe.moe_ffn_hidden_size,
        "num_experts": [moe.num_moe_experts],
        "num_experts_per_tok": moe.moe_router_topk,
        "moe_expert_interval": 1,
        "moe_2layer_gate": False,
        "moe_use_mixtral_gating": False,
        "moe_feature_no_mul_topk": True,
        "router_aux_loss_coef": write_balance(moe),
        **gating,
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention, mixture(NAMES))


FAMILY = Family(
    "skywork_moe",
    ("SkyworkForCausalLM", "SkyworkMoeForCausalLM"),
    sections,
    checked(sections, config),
    groups,
    without_weights=(FREQUENCIES,),
)
