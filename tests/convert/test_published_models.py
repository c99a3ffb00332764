"""What the families make of published models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from published_configs import PUBLISHED
from tiny_families import experiment_of

from megatron_moe.config.loading import load
from megatron_moe.convert.agreement import disagreements
from megatron_moe.convert.families import FAMILIES
from megatron_moe.convert.family import Family
from megatron_moe.plan import plan as plans

CONFIGS = Path(__file__).parents[2] / "configs"


def family_of(name: str) -> Family:
    (architecture,) = PUBLISHED[name]["architectures"]
    (family,) = (it for it in FAMILIES.values() if architecture in it.architectures)
    return family


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("Skywork")])
def test_has_as_many_parameters_as_in_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = copy.deepcopy(PUBLISHED[name])
    # The library builds this layer to draft tokens only.
    given.pop("num_nextn_predict_layers", None)
    given.pop("quantization_config", None)
    sections = family_of(name).sections({**given, "num_nextn_predict_layers": 0} if "V3" in name else given)
    planned = plans.make(experiment_of(sections)).parameters.total
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    assert planned == sum(weight.numel() for weight in model.parameters())


RECIPES = {
    "mixtral_8x7b": "Mixtral-8x7B-v0.1",
    "mixtral_8x22b": "Mixtral-8x22B-v0.1",
    "qwen2_57b_a14b": "Qwen2-57B-A14B",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
    "qwen3_235b_a22b": "Qwen3-235B-A22B",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "skywork_moe_146b": "Skywork-MoE-Base",
}
STRETCHED_LATER = {"model.max_position_embeddings", "model.multi_latent_attention"}
"""What models got after the pretraining that the recipes are of."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_computes_what_the_published_model_computes(recipe: str) -> None:
    name = RECIPES[recipe]
    experiment = load(CONFIGS / f"{recipe}.yaml").experiment
    sections = family_of(name).sections(PUBLISHED[name])
    different = {it.key for it in disagreements(experiment, sections)}
    assert different <= STRETCHED_LATER
