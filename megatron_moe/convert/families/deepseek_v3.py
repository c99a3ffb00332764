"""DeepSeek-V3: V2 with sigmoid scores, balanced by biases, and a layer that predicts one more token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group, same
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
from megatron_moe.convert.transformer_weights import MoENames, edges, latent_attention, layers, mixture

_GROUP_SCORE = 2
"""A group's score is the sum of so many of its experts' best ones."""


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_latent_transformer(given)
    given.require("scoring_func", "sigmoid", "is not the sigmoid of this family")
    given.require("topk_method", "noaux_tc", "is not the noaux_tc of this family")
    given.require("rope_interleave", True, "would turn other channels than this program")
    given.require("seq_aux", True, "is not the loss over each sequence of this family")
    model["mtp_num_layers"] = given.get("num_nextn_predict_layers", "num_mtp_layers", default=1)
    chosen, normalized = (
        given.get("num_experts_per_tok", default=8),
        given.get("norm_topk_prob", default=True),
    )
    if normalized and chosen == 1:
        given.refuse(
            "norm_topk_prob", "is read differently by the published code and by transformers, with one expert"
        )
    groups = read_groups(given, groups=8, chosen=4)
    moe = {
        **read_mixture(given, experts=256, shared=1, width=2048, dense=3),
        "moe_router_topk": chosen,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_norm_topk": normalized,
        **read_scaling(given, 2.5),
        **groups,
        **({"moe_router_group_score_topk": _GROUP_SCORE} if groups else {}),
        **read_balance(given.get("aux_loss_alpha", default=0.0001), "seq_aux_loss"),
    }
    if model["mtp_num_layers"] and moe["moe_first_k_dense_layers"] >= model["num_layers"]:
        given.refuse("num_nextn_predict_layers", "would be a layer with experts behind a model without")
    given.finish()
    return {"model": model, "moe": moe}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    moe = mixture_of(e)
    return {
        "model_type": "deepseek_v3",
        **write_latent_transformer(e),
        **write_mixture(e, moe),
        "num_nextn_predict_layers": e.model.mtp_num_layers,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": moe.moe_router_norm_topk,
        "seq_aux": True,
        "aux_loss_alpha": write_balance(moe, "seq_aux_loss"),
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family. The further layers are numbered behind the others, and repeat the embedding and the output
    layer, which here are those of the model."""
    first, experts = e.model.num_layers, mixture(MoENames())
    further = [f"model.layers.{first + depth}" for depth in range(e.model.mtp_num_layers)]
    yield from edges(e, repeated_in=further)
    yield from layers(e, latent_attention, experts)
    for depth, theirs in enumerate(further):
        ours = f"mtp.layers.{depth}"
        for name in ("enorm", "hnorm", "eh_proj"):
            yield same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
        yield same(f"{ours}.final_layernorm.weight", f"{theirs}.shared_head.norm.weight")
        yield from latent_attention(e, f"{ours}.transformer_layer", theirs)
        yield from experts(e, f"{ours}.transformer_layer", theirs)


FAMILY = Family("deepseek_v3", ("DeepseekV3ForCausalLM",), sections, checked(sections, config), groups)
