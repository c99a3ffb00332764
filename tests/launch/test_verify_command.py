"""`verify` starts the layout's ranks and then one process, over a stand-in for what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_in_training import install

from megatron_moe.config.errors import InputError
from megatron_moe.launch.command import verify

RUN_PART = """
import os, sys, types

def run_part(folder, part, experiment, steps, tolerance):
    p = experiment.parallel
    layers = experiment.pipeline.layers_per_stage, experiment.recompute.layers_per_stage
    seen = (os.environ["WORLD_SIZE"], p.tensor_model_parallel_size, p.expert_model_parallel_size, *layers)
    with open("parts.txt", "a") as file:
        print(part, *seen, steps, tolerance, file=file)
    (folder / f"{part}_was_here").touch()
    if part == "reference":
        assert (folder / "layout_was_here").exists()
        return int(os.environ["FAKE_TRAINING"])
    return 0

module = types.ModuleType("megatron_moe.training.verify")
module.run_part = run_part
sys.modules[module.__name__] = module
"""

LAYOUT = [
    "parallel={tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, data_parallel_size: 1}",
    "moe={num_moe_experts: 2}",
    "model.num_layers=3",
    "pipeline.layers_per_stage=[2, 1]",
    "pipeline.num_layers_in_first_stage=2",
    "pipeline.mtp_stage=1",
    "model.mtp_num_layers=1",
    "recompute.layers_per_stage=[1, 0]",
]


@pytest.mark.parametrize("code", [0, 1])
def test_one_process_follows_the_ranks_and_decides(tmp_path, monkeypatch, capfd, code):
    config = install(tmp_path, monkeypatch, str(code))
    with open(tmp_path / "site" / "sitecustomize.py", "a") as site:
        site.write(RUN_PART)
    assert verify(config, LAYOUT, steps=2, tolerance=1e-5) == code
    lines = Path("parts.txt").read_text().splitlines()
    assert lines == ["layout 4 2 2 [2, 1] [1, 0] 2 1e-05"] * 4 + ["reference 1 1 1 [3] [0] 2 1e-05"]
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "runs" / "small").exists()


def test_it_is_no_rank_itself(tmp_path, monkeypatch):
    config = install(tmp_path, monkeypatch)
    for name, text in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match="without torchrun"):
        verify(config, [], steps=1, tolerance=1e-5)
