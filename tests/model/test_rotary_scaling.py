"""Stretched rotary positions against those of transformers, and the products of queries and keys that they
make."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from experiments import experiment

from megatron_moe.model.rotary import frequencies, softmax_scale

BASE, WIDTH = 1234.5, 16
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3, other limits": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 3.0},
    "yarn": YARN,
    "yarn of gpt-oss": YARN | {"truncate": False, "factor": 32.0},
    "yarn, other limits": YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.3},
    "yarn, a short original": YARN | {"original_max_position_embeddings": 4},
}


def of_transformers(scaling: dict[str, Any], part: float) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {name: value for name, value in scaling.items() if name != "kind"}
    if scaling["kind"] == "llama3":
        given = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | given
    parameters = {"rope_type": scaling["kind"], "rope_theta": BASE, "partial_rotary_factor": part, **given}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=WIDTH, rope_parameters=parameters)
    found, factor = ROPE_INIT_FUNCTIONS[scaling["kind"]](config)
    return found, factor


@pytest.mark.parametrize(
    ("name", "part"), [*((name, 1.0) for name in CASES), ("linear", 0.5), ("llama3", 0.5)]
)
def test_frequencies_and_sharpening(name: str, part: float) -> None:
    scaling = CASES[name]
    model = experiment(
        model={"kv_channels": WIDTH, "rotary_base": BASE, "rotary_percent": part, "rotary_scaling": scaling}
    ).model
    exact, factor = of_transformers(scaling, part)
    torch.testing.assert_close(frequencies(model), exact, rtol=1e-6, atol=0)
    scale = softmax_scale(model)
    assert (1 / math.sqrt(WIDTH) if scale is None else scale) == pytest.approx(factor**2 / math.sqrt(WIDTH))


def test_plain_positions_stay_plain() -> None:
    model = experiment(model={"kv_channels": WIDTH, "rotary_base": BASE}).model
    exact = [BASE ** (-channel / WIDTH) for channel in range(0, WIDTH, 2)]
    torch.testing.assert_close(frequencies(model), torch.tensor(exact), rtol=1e-6, atol=0)
    assert softmax_scale(model) is None
