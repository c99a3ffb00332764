"""gpt-oss: sinks, windows in every second layer, biases everywhere, a clamped gate, experts in one tensor.

Their experts lie transposed, [e, h, 2 f] and [e, f, h], and gate and up-projection take turns, channel by
channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import (
    read_transformer,
    read_window,
    write_layer_types,
    write_transformer,
)
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group, Tensors, same, stacked
from megatron_moe.convert.family import Family, Json
from megatron_moe.convert.moe_config import mixture_of, read_balance, write_balance
from megatron_moe.convert.transformer_weights import attention, transformer

_POSITIONS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_CLAMPED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    quantized = config.get("quantization_config") or {}
    if quantized.get("quant_method") == "mxfp4":
        given.refuse(
            "quantization_config",
            "is MXFP4, which is not read: load it in transformers with Mxfp4Config(dequantize=True), and "
            "save that",
        )
    model = read_transformer(given, epsilon=1e-5, theta=150000.0, head_dim=64, scaling=_POSITIONS)
    if model["activation"] != "swiglu":
        given.refuse("hidden_act", "is not silu")
    for key, value in _CLAMPED.items():
        given.require(key, value, f"is not {value}, the one that is computed")
    given.get("initial_context_length", default=None)
    biases = given.get("attention_bias", default=True)
    model |= {"activation": "clamped_swiglu", "mlp_bias": True, "attention_sinks": True}
    model |= {"qkv_bias": biases, "attention_output_bias": biases}
    window = 0 if given.is_null("sliding_window") else given.get("sliding_window", default=128)
    model |= read_window(given, window, [layer % 2 == 0 for layer in range(model["num_layers"])])
    moe = {
        "num_moe_experts": given.get("num_local_experts", "num_experts", default=128),
        "moe_router_topk": given.get("num_experts_per_tok", "experts_per_token", default=4),
        "moe_ffn_hidden_size": model["ffn_hidden_size"],
        "moe_router_bias": True,
        **read_balance(given.get("router_aux_loss_coef", default=0.001)),
    }
    given.finish()
    return {"model": model, "moe": moe}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    moe = mixture_of(e)
    return {
        "model_type": "gpt_oss",
        **write_transformer(e),
        **write_layer_types(e),
        **_CLAMPED,
        "intermediate_size": moe.moe_ffn_hidden_size,
        "attention_bias": e.model.qkv_bias,
        "num_local_experts": moe.num_moe_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "router_aux_loss_coef": write_balance(moe),
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention, _mixture)


def _mixture(e: Experiment, ours: str, theirs: str) -> Iterator[Group]:
    yield same(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
    for kind in ("weight", "bias"):
        yield same(f"{ours}.mlp.router.{kind}", f"{theirs}.mlp.router.{kind}")
    experts = range(mixture_of(e).num_moe_experts)
    for kind, ending in (("weight", ""), ("bias", "_bias")):
        first = [f"{ours}.mlp.experts.{expert}.linear_fc1.{kind}" for expert in experts]
        second = [f"{ours}.mlp.experts.{expert}.linear_fc2.{kind}" for expert in experts]
        yield Group(tuple(first), (f"{theirs}.mlp.experts.gate_up_proj{ending}",), _apart, _in_turns)
        down = stacked(second, f"{theirs}.mlp.experts.down_proj{ending}")
        yield down if kind == "bias" else _transposed(down)


def _apart(x: Tensors) -> Tensors:
    """[e, h, 2 f] or [e, 2 f] -> e times [2 f, h] or [2 f], the gate before the up-projection."""
    rows = [expert.mT if expert.dim() == 2 else expert for expert in x[0]]
    return [torch.cat([expert[::2], expert[1::2]]) for expert in rows]


def _in_turns(x: Tensors) -> Tensors:
    """Back."""
    rows = torch.stack([torch.stack(expert.chunk(2), dim=1).flatten(0, 1) for expert in x])
    return [rows.mT.contiguous() if rows.dim() == 3 else rows]


def _transposed(group: Group) -> Group:
    return Group(
        group.ours,
        group.theirs,
        lambda x: [matrix.mT.contiguous() for matrix in group.to_ours(x)],
        lambda x: [matrices.mT.contiguous() for matrices in group.to_theirs(x)],
    )


FAMILY = Family("gpt_oss", ("GptOssForCausalLM",), sections, checked(sections, config), groups)
