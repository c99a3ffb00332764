"""Qwen2: biases of queries, keys and values; a window from some layer on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import checked
from megatron_moe.convert.backbone_config import (
    read_transformer,
    read_window,
    window_from_layer,
    write_transformer,
    write_window_from_layer,
)
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.correspondence import Group
from megatron_moe.convert.family import Family, Json
from megatron_moe.convert.transformer_weights import attention, transformer


def sections(config: Json) -> dict[str, Any]:
    """See Family."""
    given = ConfigJson(config)
    model = read_transformer(given, epsilon=1e-6) | {"qkv_bias": True}
    model |= read_window(given, *window_from_layer(given))
    given.finish()
    return {"model": model}


def config(e: Experiment) -> dict[str, Any]:
    """See Family."""
    return {"model_type": "qwen2", **write_transformer(e), **write_window_from_layer(e)}


def groups(e: Experiment) -> Iterator[Group]:
    """See Family."""
    return transformer(e, attention)


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), sections, checked(sections, config), groups)
