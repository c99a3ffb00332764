"""Qwen2-MoE: a gated shared expert, and weights that are shares of all experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import (
    read_transformer,
    read_window,
    write_layer_types,
    write_transformer,
)
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
    model = read_transformer(given, epsilon=1e-6) | {"qkv_bias": given.get("qkv_bias", default=True)}
    model |= read_window(given, *_windows(given))
    moe = {
        "num_moe_experts": given.get("num_experts", "num_local_experts", default=60),
        "moe_router_topk": given.get("num_experts_per_tok", default=4),
        "moe_ffn_hidden_size": given.get("moe_intermediate_size", default=1408),
        "moe_shared_expert_intermediate_size": given.get("shared_expert_intermediate_size", default=5632),
        "moe_shared_expert_gate": True,
        **read_sparse_layers(given),
        **read_softmax(given),
        **read_balance(given.get("router_aux_loss_coef", default=0.001)),
    }
    given.finish()
    return {"model": model, "moe": moe}


def _windows(given: ConfigJson) -> tuple[int, list[bool]]:
    """As the library's class computes layer_types where there are none."""
    last = given.get("max_window_layers", default=28)
    window = given.get("sliding_window", default=4096)
    if not given.get("use_sliding_window", default=False):
        window = 0
    return window, [layer % 2 == 0 and layer < last for layer in range(given.layers())]


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    moe = mixture_of(e)
    return {
        "model_type": "qwen2_moe",
        **write_transformer(e),
        **write_layer_types(e),
        "use_sliding_window": e.model.sliding_window is not None,
        **write_sparse_layers(e),
        "qkv_bias": e.model.qkv_bias,
        "num_experts": moe.num_moe_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "norm_topk_prob": not moe.moe_router_pre_softmax,
        "moe_intermediate_size": moe.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "router_aux_loss_coef": write_balance(moe),
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention, mixture(MoENames(shared="mlp.shared_expert")))


FAMILY = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), sections, checked(sections, config), groups)
