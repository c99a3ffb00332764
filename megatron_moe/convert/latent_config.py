"""What config.json says of DeepSeek's models, V2 and V3, and back: latent attention, groups of experts."""

from __future__ import annotations

from typing import Any

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE
from megatron_moe.convert.backbone_config import read_backbone, write_backbone
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.family import NotOfFamily
from megatron_moe.convert.rotary_config import read_latent_rotary, write_latent_rotary

Values = dict[str, Any]

_EPSILON = 1e-6
"""Of the norms behind narrow projections, whatever rms_norm_eps says."""


def read_latent_transformer(config: ConfigJson) -> Values:
    """Keys of `model`."""
    model = read_backbone(config, _EPSILON)
    config.require("rms_norm_eps", _EPSILON, f"is not the {_EPSILON} of the norms behind narrow projections")
    for biases in ("attention_bias", "mlp_bias"):
        config.require(biases, False, "would be biases that this model does not have here")
    for follows in ("num_key_value_heads", "head_dim", "qk_head_dim"):
        config.get(follows, default=None)
    rank = config.get("q_lora_rank", default=0 if config.is_null("q_lora_rank") else 1536)
    positions, stretched = read_latent_rotary(config)
    latent = {
        "kv_lora_rank": config.get("kv_lora_rank", default=512),
        "qk_head_dim": config.get("qk_nope_head_dim", default=128),
        "qk_pos_emb_head_dim": config.get("qk_rope_head_dim", default=64),
        "v_head_dim": config.get("v_head_dim", default=128),
        **({"q_lora_rank": rank} if rank else {}),
        **stretched,
    }
    heads = {"num_attention_heads": config.integer("num_attention_heads")}
    return {**model, **heads, **positions, "multi_latent_attention": latent}


def write_latent_transformer(e: Experiment) -> Values:
    """The other way round. Raises NotOfFamily for another attention."""
    latent = e.model.multi_latent_attention
    if latent is None:
        raise NotOfFamily("model.multi_latent_attention: left out, but this family has it")
    return {
        **write_backbone(e),
        "num_attention_heads": e.model.num_attention_heads,
        "num_key_value_heads": e.model.num_attention_heads,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_head_dim,
        "qk_rope_head_dim": latent.qk_pos_emb_head_dim,
        "v_head_dim": latent.v_head_dim,
        "attention_bias": False,
        **write_latent_rotary(e),
    }


def read_mixture(config: ConfigJson, experts: int, shared: int, width: int, dense: int) -> Values:
    """Keys of `moe`, without the router's.

    Args: the family's defaults.
    """
    width = config.get("moe_intermediate_size", default=width)
    shared = 0 if config.is_null("n_shared_experts") else config.get("n_shared_experts", default=shared)
    config.require(
        "moe_layer_freq", 1, "is not 1: which layers hold experts is not what first_k_dense_replace says"
    )
    return {
        "num_moe_experts": config.get(
            "n_routed_experts", "num_experts", "num_local_experts", default=experts
        ),
        "moe_ffn_hidden_size": width,
        "moe_first_k_dense_layers": config.get("first_k_dense_replace", default=dense),
        **({"moe_shared_expert_intermediate_size": shared * width} if shared else {}),
    }


def write_mixture(e: Experiment, moe: MoE) -> Values:
    """The other way round."""
    layers, width = moe_layers(e), moe.moe_ffn_hidden_size
    shared = moe.moe_shared_expert_intermediate_size or 0
    assert width is not None
    if shared % width:
        raise NotOfFamily(
            f"moe.moe_shared_expert_intermediate_size: {shared} is no multiple of "
            f"moe.moe_ffn_hidden_size ({width}), and this family counts shared experts"
        )
    return {
        "n_routed_experts": moe.num_moe_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width or None,
        "first_k_dense_replace": layers.index(True) if any(layers) else len(layers),
        "moe_layer_freq": 1,
        "routed_scaling_factor": moe.moe_router_topk_scaling_factor or 1.0,
        "n_group": moe.moe_router_num_groups or 1,
        "topk_group": moe.moe_router_group_topk or 1,
    }


def read_groups(config: ConfigJson, groups: int, chosen: int) -> Values:
    """Of how many groups of experts a token chooses among how many; nothing where it may choose all.

    Args: the family's defaults.
    """
    groups, chosen = config.get("n_group", default=groups), config.get("topk_group", default=chosen)
    if groups == chosen:
        return {}
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def read_scaling(config: ConfigJson, factor: float) -> Values:
    """The factor on all weights.

    Args: the family's default.
    """
    return {"moe_router_topk_scaling_factor": config.get("routed_scaling_factor", default=factor)}
