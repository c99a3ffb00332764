"""Weights with rates of their own, and a batch that grows: in layouts, over a resume, in the metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import train_on_ranks as on_ranks
import verify_on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout
from training_runs import assert_same, checkpoint, copy_until, records, tensors

from megatron_moe.config.schema import Experiment

OWN = {"decoupled_lr": 2e-2, "decoupled_min_lr": 1e-3, "expert_lr": 5e-3}
RAMP = [2, 2, 6]
"""Steps of 2, 2, 4 and then 6 sequences, with 6 as the global batch."""
TIED = {"num_layers": 2, "untie_embeddings_and_output_weights": False}


def made(parallel: dict[str, Any], steps: int = 5, **sections: Any) -> Experiment:
    training = {
        "train_iters": steps,
        "global_batch_size": 6,
        "micro_batch_size": 1,
        "rampup_batch_size": RAMP,
        **sections.pop("training", {}),
    }
    settings = {"checkpoint": {"save_interval": 3}, "optimizer": {"lr": 1e-2, "lr_warmup_iters": 1, **OWN}}
    return experiment(
        parallel=parallel,
        training=training,
        model={**TIED, **sections.pop("model", {})},
        **settings | sections,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under EDP, with a checkpoint within the ramp."""
    run = tmp_path_factory.mktemp("edp") / "run"
    ranks(2).run(on_ranks.train, made(layout(tp=2)), run)
    return run


def test_a_resume_within_the_ramp_is_exact(whole: Path, tmp_path: Path) -> None:
    run = copy_until(whole, tmp_path / "run", 3)
    assert ranks(2).run(on_ranks.train, made(layout(tp=2)), run) == [3, 3]
    assert records(run) == records(whole)
    assert_same(tensors(checkpoint(run, 5)), tensors(checkpoint(whole, 5)))


@pytest.mark.second_pair
def test_other_layouts_go_on_within_the_ramp(whole: Path, tmp_path: Path) -> None:
    """Stages without embedding, replicas, and one process: each finds its groups in the checkpoint."""
    run = copy_until(whole, tmp_path / "run", 3)
    assert ranks(2).run(on_ranks.train, made(layout(pp=2)), run, 4) == [3, 3]
    assert ranks(2).run(on_ranks.train, made(layout(dp=2)), run) == [4, 4]
    for mine, theirs in zip(records(run), records(whole), strict=True):
        for key in ("iteration", "lr", "lr/embedding", "lr/experts", "global_batch_size", "consumed_tokens"):
            assert mine[key] == theirs[key]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    mine, theirs = (tensors(checkpoint(folder, 5)) for folder in (run, whole))
    moments = [name for name in theirs if "exp_avg" in name]
    assert any("embedding" in name for name in moments) and any("experts" in name for name in moments)
    for name in moments:
        assert (mine[name] - theirs[name]).norm() < 1e-3 * theirs[name].norm(), name


def test_metrics_are_of_the_batch_of_the_step(whole: Path) -> None:
    found = records(whole)
    assert [record["global_batch_size"] for record in found] == [2, 2, 4, 6, 6]
    assert [record["consumed_tokens"] for record in found] == [32 * n for n in (2, 4, 8, 14, 20)]
    assert found[0]["lr"] == 1e-2 and found[0]["lr/embedding"] == 2e-2 and found[0]["lr/experts"] == 5e-3
    assert found[-1]["lr"] == 0.0 and found[-1]["lr/embedding"] == 1e-3


def test_samples_come_in_the_same_order_as_without_a_ramp(tmp_path: Path) -> None:
    """Where no weight moves, the losses of the same samples have the same sum, however they are cut."""

    def sums(ramp: list[int] | None, steps: int) -> list[float]:
        still = {"lr": 1e-30, "weight_decay": 0.0}
        setup = made(layout(), steps, moe=None, optimizer=still, training={"rampup_batch_size": ramp})
        (found,) = ranks(1).run(on_ranks.steps, setup, tmp_path / str(ramp), steps)
        return [record["loss"] * record.get("global_batch_size", 6) for record in found]

    constant = sums(None, 3)
    halves = sums([3, 3, 4], 4)
    assert math.isclose(halves[0] + halves[1], constant[0], rel_tol=1e-6)
    assert halves[2:] == pytest.approx(constant[1:], rel=1e-6)


LAYOUTS = {
    "PP2 VPP2, tied": made(layout(pp=2, vpp=2), model={"num_layers": 4}, training={"micro_batch_size": 1}),
    "TP2 EP2 (EDP)": made(layout(tp=2), moe={**MOE, "moe_shared_expert_intermediate_size": 16}),
    "DP2 EP2": made(layout(dp=2, expert_model_parallel_size=2)),
}


@pytest.mark.second_pair
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree_with_one_process(tmp_path: Path, name: str) -> None:
    under_layout = LAYOUTS[name]
    sections = {key: getattr(under_layout, key).model_dump() for key in ("model", "optimizer", "training")}
    alone = experiment(
        parallel=layout(dp=1, expert_model_parallel_size=1),
        moe=None if under_layout.moe is None else under_layout.moe.model_dump(),
        **sections,
    )
    ranks(2).run(verify_on_ranks.layout_part, under_layout, 3, tmp_path)
    (report,) = ranks(1).run(verify_on_ranks.reference_part, alone, 3, tmp_path, None)
    assert report.passed, report
