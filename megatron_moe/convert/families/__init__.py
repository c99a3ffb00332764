"""The model families, one short file each."""

from __future__ import annotations

from megatron_moe.convert.families import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    skywork_moe,
)
from megatron_moe.convert.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        llama,
        mistral,
        qwen2,
        qwen3,
        mixtral,
        qwen2_moe,
        qwen3_moe,
        olmoe,
        deepseek_v2,
        deepseek_v3,
        gpt_oss,
        skywork_moe,
    )
}
"""By their names."""
