"""Qwen3-MoE: norms of query and key heads, no shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import read_transformer, read_window, write_transformer
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.family import Family, Json
from megatron_moe.convert.moe_config import (
    mixture_of,
    read_balance,
    read_softmax,
    read_sparse_layers,
    write_balance,
    write_sparse_layers,
)
from megatron_moe.convert.transformer_weights import MoENames, attention, mixture, transformer


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_transformer(given, epsilon=1e-6) | {"qk_norm": "head"}
    model["qkv_bias"] = model["attention_output_bias"] = given.get("attention_bias", default=False)
    window = given.get("sliding_window", default=4096)
    # In this family the library has never read it.
    given.get("max_window_layers", default=0)
    model |= read_window(given, window if given.get("use_sliding_window", default=False) else 0)
    moe = {
        "num_moe_experts": given.get("num_experts", "num_local_experts", default=128),
        "moe_router_topk": given.get("num_experts_per_tok", default=8),
        "moe_ffn_hidden_size": given.get("moe_intermediate_size", default=768),
        **read_sparse_layers(given),
        **read_softmax(given),
        **read_balance(given.get("router_aux_loss_coef", default=0.001)),
    }
    given.finish()
    return {"model": model, "moe": moe}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    moe, experts = mixture_of(e), mixture_of(e).num_moe_experts
    return {
        "model_type": "qwen3_moe",
        **write_transformer(e),
        **write_sparse_layers(e),
        "attention_bias": e.model.qkv_bias,
        "sliding_window": e.model.sliding_window,
        "use_sliding_window": e.model.sliding_window is not None,
        "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "norm_topk_prob": not moe.moe_router_pre_softmax,
        "moe_intermediate_size": moe.moe_ffn_hidden_size,
        "router_aux_loss_coef": write_balance(moe),
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention, mixture(MoENames()))


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), sections, checked(sections, config), groups)
