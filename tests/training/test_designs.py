"""The published designs of docs/designs.md: each trains, and computes in EDP what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from experiments import experiment, layout
from layout_cases import verify

from megatron_moe.config.rules import violations

DOCUMENT = Path(__file__).parents[2] / "docs/designs.md"
CHAPTERS = DOCUMENT.read_text().split("\n## ")[1:]
DESIGNS: dict[str, dict[str, Any]] = {
    chapter.partition("\n")[0]: yaml.safe_load(chapter.split("```")[1].removeprefix("yaml"))
    for chapter in CHAPTERS
}


def shrunk(design: dict[str, Any]) -> dict[str, Any]:
    """The design with at most 16 experts of width 32."""
    small = {**design, "num_moe_experts": min(16, design["num_moe_experts"]), "moe_ffn_hidden_size": 32}
    if "moe_first_k_dense_layers" in design:
        small["moe_first_k_dense_layers"] = 1
    if "moe_shared_expert_intermediate_size" in design:
        small["moe_shared_expert_intermediate_size"] = 32
    return small


def shrunk_model(model: dict[str, Any]) -> dict[str, Any]:
    """The section `model` with attention of 8 instead of 128 channels a head."""
    if "multi_latent_attention" not in model:
        return model
    sizes = {name: size // 16 for name, size in model["multi_latent_attention"].items()}
    return {**model, "multi_latent_attention": sizes, "num_query_groups": None}


@pytest.mark.parametrize("title", DESIGNS)
def test_design_computes_in_edp_what_one_process_computes(title: str, tmp_path: Path) -> None:
    design = DESIGNS[title]
    sections = {"moe": shrunk(design["moe"]), "model": shrunk_model(design.get("model", {}))}
    assert violations(experiment(parallel=layout(tp=2), **sections)) == []
    assert verify(tmp_path, parallel=layout(tp=2), **sections).failures == []
