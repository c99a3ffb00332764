"""DeepSeek-V2: latent attention, shared experts, weights that are shares of all experts times a factor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.family import Family, Json
from megatron_moe.convert.latent_config import (
    read_groups,
    read_latent_transformer,
    read_mixture,
    read_scaling,
    write_latent_transformer,
    write_mixture,
)
from megatron_moe.convert.moe_config import mixture_of, read_balance, write_balance
from megatron_moe.convert.transformer_weights import MoENames, latent_attention, mixture, transformer


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_latent_transformer(given)
    given.require("scoring_func", "softmax", "is not the softmax of this family")
    given.require("norm_topk_prob", False, "is read differently by the published code and by transformers")
    method, groups = given.get("topk_method", default="greedy"), read_groups(given, groups=1, chosen=1)
    if method not in ("greedy", "group_limited_greedy"):
        given.refuse("topk_method", "is neither greedy nor group_limited_greedy")
    in_sequence = given.get("seq_aux", default=True)
    moe = {
        **read_mixture(given, experts=64, shared=2, width=1407, dense=0),
        "moe_router_topk": given.integer("num_experts_per_tok"),
        "moe_router_pre_softmax": True,
        **read_scaling(given, 1.0),
        **(groups if method == "group_limited_greedy" else {}),
        **read_balance(
            given.get("aux_loss_alpha", default=0.001), "seq_aux_loss" if in_sequence else "aux_loss"
        ),
    }
    given.finish()
    return {"model": model, "moe": moe}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    moe = mixture_of(e)
    in_sequence = moe.moe_router_load_balancing_type != "aux_loss"
    return {
        "model_type": "deepseek_v2",
        **write_latent_transformer(e),
        **write_mixture(e, moe),
        "mlp_bias": False,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "topk_method": "greedy" if moe.moe_router_num_groups is None else "group_limited_greedy",
        "seq_aux": in_sequence,
        "aux_loss_alpha": write_balance(moe, "seq_aux_loss" if in_sequence else "aux_loss"),
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, latent_attention, mixture(MoENames()))


FAMILY = Family("deepseek_v2", ("DeepseekV2ForCausalLM",), sections, checked(sections, config), groups)
