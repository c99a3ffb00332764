"""The experiments in examples/ load on the folders that the commands before them make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_folders import write_folder

from megatron_moe.config.loading import load
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.importing import import_model
from megatron_moe.convert.upcycle import upcycle_model
from megatron_moe.convert.upcycling_rules import Changes
from megatron_moe.inference.evaluation.task import read_task
from megatron_moe.plan.costs.parameters import flops_per_token

ROOT = Path(__file__).parents[1]
SHORTER = "training.seq_length=32"  # the tiny model knows 64 positions


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with examples/ and corpus/, and a tiny model under checkpoints/."""
    folder = tmp_path_factory.mktemp("project")
    for part in ("examples", "corpus"):
        shutil.copytree(ROOT / part, folder / part)
    model = write_folder(folder / "model", "llama")
    words = {"model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "a"}}
    (model / "tokenizer.json").write_text(json.dumps(words))
    dense, mixture = (folder / "checkpoints" / name for name in ("dense", "mixture"))
    import_model(model, dense, dtype=None, config_path=None, workers=1)
    upcycle_model(dense, mixture, experts=4, granularity=1, top_k=None, changes=Changes(0.02), workers=1)
    for part in ("train", "test"):
        record = {"question": "How many?", "answer": "#### 2"}
        (folder / f"examples/finetuning/gsm8k_{part}.jsonl").write_text(json.dumps(record))
    return folder


def loaded(root: Path, name: str) -> Experiment:
    return load(root / "examples" / name, [SHORTER]).experiment


def test_the_arms_of_upcycling_see_the_same_batches(root: Path) -> None:
    upcycled, from_scratch, dense = (
        loaded(root, f"upcycling/{name}.yaml") for name in ("upcycled", "from_scratch", "dense")
    )
    assert upcycled.training == from_scratch.training == dense.training
    assert upcycled.data.prepare == from_scratch.data.prepare == dense.data.prepare
    assert upcycled.moe is not None and upcycled.moe == from_scratch.moe and dense.moe is None
    assert upcycled.model == from_scratch.model
    starts = [run.checkpoint.initialize_from for run in (upcycled, from_scratch, dense)]
    assert [start and Path(start).resolve().name for start in starts] == ["mixture", None, "dense"]


def test_word_problems_start_from_the_model_and_learn_answers(root: Path) -> None:
    experiment = loaded(root, "finetuning/word_problems.yaml")
    assert experiment.data.kind == "instruction"
    start = experiment.checkpoint.initialize_from
    assert start is not None and Path(start).resolve() == (root / "checkpoints/dense").resolve()


def test_answers_are_asked_for_as_they_were_learned() -> None:
    task = read_task(ROOT / "examples" / "finetuning" / "answers.yaml")
    assert (task.prompt, task.name) == ("question", "answers")


def test_a_token_costs_the_mixture_what_it_costs_its_dense_twin() -> None:
    moe, dense = (
        load(ROOT / "examples" / "equal_flops" / f"{name}.yaml").experiment for name in ("moe", "dense")
    )
    assert moe.training == dense.training
    # The router, 8 rows of 128 in each of 4 layers, is what the mixture has beyond it.
    assert flops_per_token(moe) - flops_per_token(dense) == 3 * 2 * 4 * 8 * 128
