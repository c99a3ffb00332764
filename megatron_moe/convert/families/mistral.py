"""Mistral: as Llama, without biases, with a window in all layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import read_transformer, read_window, write_transformer
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.family import Family, Json
from megatron_moe.convert.transformer_weights import attention, transformer


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_transformer(given, epsilon=1e-6)
    window = given.get("sliding_window", default=0 if given.is_null("sliding_window") else 4096)
    model |= read_window(given, window)
    given.finish()
    return {"model": model}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    return {"model_type": "mistral", **write_transformer(e), "sliding_window": e.model.sliding_window}


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention)


FAMILY = Family("mistral", ("MistralForCausalLM",), sections, checked(sections, config), groups)
