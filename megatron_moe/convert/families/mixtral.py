"""Mixtral: experts in all layers, weighed by a softmax over the chosen ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import read_transformer, read_window, write_transformer
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.family import Family, Json
from megatron_moe.convert.moe_config import mixture_of, read_balance, write_balance
from megatron_moe.convert.transformer_weights import MoENames, attention, mixture, transformer


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_transformer(given, epsilon=1e-5, theta=1e6)
    model |= read_window(given, given.get("sliding_window", default=0))
    given.require("router_jitter_noise", 0.0, "changes what experts get too: set it to 0")
    moe = {
        "num_moe_experts": given.get("num_local_experts", "num_experts", default=8),
        "moe_router_topk": given.get("num_experts_per_tok", default=2),
        "moe_ffn_hidden_size": model["ffn_hidden_size"],
        **read_balance(given.get("router_aux_loss_coef", default=0.001)),
    }
    given.finish()
    return {"model": model, "moe": moe}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    moe = mixture_of(e)
    return {
        "model_type": "mixtral",
        **write_transformer(e),
        "intermediate_size": moe.moe_ffn_hidden_size,
        "sliding_window": e.model.sliding_window,
        "num_local_experts": moe.num_moe_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "router_aux_loss_coef": write_balance(moe),
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention, mixture(NAMES))


NAMES = MoENames("block_sparse_moe.gate", "block_sparse_moe.experts", gate="w1", up="w3", down="w2")


FAMILY = Family("mixtral", ("MixtralForCausalLM",), sections, checked(sections, config), groups)
