"""OLMoE: norms of all query and of all key heads together, clamped queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import read_transformer, write_transformer
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.family import Family, Json
from megatron_moe.convert.moe_config import mixture_of, read_balance, read_softmax, write_balance
from megatron_moe.convert.transformer_weights import MoENames, attention, mixture, transformer


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_transformer(given, epsilon=1e-5) | {"qk_norm": "all_heads"}
    model["qkv_bias"] = model["attention_output_bias"] = given.get("attention_bias", default=False)
    if model["kv_channels"] * model["num_attention_heads"] != model["hidden_size"]:
        given.refuse(
            "head_dim", "is not hidden_size over num_attention_heads, the width of this family's norms"
        )
    if (limit := given.get("clip_qkv", default=0.0)) > 0:
        model["clip_qkv"] = limit
    elif limit < 0:
        given.refuse("clip_qkv", "is less than 0")
    moe = {
        "num_moe_experts": given.get("num_experts", "num_local_experts", default=64),
        "moe_router_topk": given.get("num_experts_per_tok", default=8),
        "moe_ffn_hidden_size": model["ffn_hidden_size"],
        **read_softmax(given),
        **read_balance(given.get("router_aux_loss_coef", default=0.01)),
    }
    given.finish()
    return {"model": model, "moe": moe}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    moe = mixture_of(e)
    return {
        "model_type": "olmoe",
        **write_transformer(e),
        "intermediate_size": moe.moe_ffn_hidden_size,
        "attention_bias": e.model.qkv_bias,
        "clip_qkv": e.model.clip_qkv,
        "num_experts": moe.num_moe_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "norm_topk_prob": not moe.moe_router_pre_softmax,
        "router_aux_loss_coef": write_balance(moe),
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention, mixture(MoENames()))


FAMILY = Family("olmoe", ("OlmoeForCausalLM",), sections, checked(sections, config), groups)
