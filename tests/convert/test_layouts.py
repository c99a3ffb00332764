"""What is imported fills a model in every layout, whoever loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import filled_on_ranks
import pytest
import torch
from distributed import RankError, ranks
from experiments import layout
from huggingface_folders import write_folder
from tiny_families import CASES, tiny

from megatron_moe.cli import main
from megatron_moe.config.defaults import fill
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.families import FAMILIES
from megatron_moe.convert.models import open_model
from megatron_moe.engine.weight_files import CheckpointWeights

UNEVEN = {"parallel": layout(pp=2), "pipeline": {"layers_per_stage": [1, 2]}}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, TP2": ("llama", {"parallel": layout(tp=2)}),
    "dense, tied, PP2": ("qwen3", {"parallel": layout(pp=2)}),
    "experts, TP2 x EP2": ("qwen3_moe", {"parallel": layout(tp=2, expert_model_parallel_size=2)}),
    "experts, ETP2": (
        "qwen3_moe",
        {"parallel": layout(tp=2, expert_tensor_parallel_size=2, expert_model_parallel_size=1)},
    ),
    "experts, PP2 uneven": ("qwen3_moe", UNEVEN),
    "latent, TP2 x EP2": ("deepseek_v2", {"parallel": layout(tp=2, expert_model_parallel_size=2)}),
    "further token, PP2 uneven": ("deepseek_v3", UNEVEN),
    "stacked experts with biases, two replicas": (
        "gpt_oss",
        {"parallel": layout(dp=2, expert_model_parallel_size=1)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_weights_arrive(name: str, tmp_path: Path) -> None:
    case, sections = LAYOUTS[name]
    source = write_folder(tmp_path / "source", case)
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    experiment = in_layout(case, sections)
    exact = open_model(tmp_path / "ours").weights
    for run, path in (
        (filled_on_ranks.fill_and_save, source),
        (filled_on_ranks.fill_and_save, tmp_path / "ours"),
        (filled_on_ranks.load_and_save, tmp_path / "ours"),
    ):
        out = tmp_path / "out" / f"{run.__name__}_{path.name}"
        out.mkdir(parents=True)
        ranks(2).run(run, experiment, str(path), str(out))
        there = CheckpointWeights(out)
        assert there.inventory() == dict(exact.inventory())
        for weight in exact.inventory():
            assert torch.equal(there.read(weight), exact.read(weight)), weight


def test_a_model_of_another_shape_is_refused_on_all_ranks(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "qwen3_moe")
    experiment = in_layout("qwen3_moe", {"parallel": layout(tp=2)})
    wider = experiment.model_copy(
        update={"moe": experiment.moe and experiment.moe.model_copy(update={"moe_ffn_hidden_size": 20})}
    )
    with pytest.raises(RankError) as raised:
        ranks(2).run(filled_on_ranks.fill_and_save, wider, str(source), str(tmp_path))
    message = str(raised.value)
    assert raised.value.kind == "InputError"
    assert "decoder.layers.2.mlp.experts.5.linear_fc1.weight [24, 24] instead of [40, 24]" in message
    assert "model.layers.2.mlp.experts.5.gate_proj.weight [12, 24]" in message


def in_layout(case: str, sections: dict[str, Any]) -> Experiment:
    model = tiny(case)
    return fill(
        Experiment.model_validate(
            {
                "name": "tiny",
                **FAMILIES[CASES[case].family].sections(model.config),
                "data": {"kind": "mock"},
                "training": {
                    "train_iters": 1,
                    "global_batch_size": 2,
                    "micro_batch_size": 1,
                    "seq_length": 24,
                },
                **sections,
            }
        )
    )
