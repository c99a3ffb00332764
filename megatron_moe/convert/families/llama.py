"""Llama 2 and 3, and the many models of their form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import read_transformer, write_transformer
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.family import Family, Json
from megatron_moe.convert.transformer_weights import FREQUENCIES, attention, transformer


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_transformer(given, epsilon=1e-6)
    model["qkv_bias"] = model["attention_output_bias"] = given.get("attention_bias", default=False)
    model["mlp_bias"] = given.get("mlp_bias", default=False)
    given.require("rope_interleaved", False, "would turn other channels than this program")
    given.finish()
    return {"model": model}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    return {
        "model_type": "llama",
        **write_transformer(e),
        "attention_bias": e.model.qkv_bias,
        "mlp_bias": e.model.mlp_bias,
    }


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention)


FAMILY = Family(
    "llama",
    ("LlamaForCausalLM",),
    sections,
    checked(sections, config),
    groups,
    without_weights=(FREQUENCIES,),
)
