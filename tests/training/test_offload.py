"""The optimizer's state on the host: the same steps to the bit, and checkpoints that can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import offload_on_ranks as on_ranks
import pytest
import train_on_ranks
import verify_on_ranks
from distributed import ranks
from experiments import experiment, layout
from training_runs import assert_same, checkpoint, copy_until, records, tensors

TRAINING = {"precision": "bf16", "train_iters": 4, "global_batch_size": 4}


def made(offloads: bool, fraction: float = 1.0, dp: int = 2) -> Any:
    optimizer = {"lr": 1e-2, "expert_lr": 5e-3, "clip_grad": 0.5}
    if offloads:
        optimizer |= {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    return experiment(
        model={"num_layers": 2},
        parallel=layout(dp=dp),
        optimizer=optimizer,
        training=TRAINING,
        checkpoint={"save_interval": 2},
    )


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    ranks(2).run(train_on_ranks.train, made(False), run)
    return run


@pytest.mark.second_pair
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_same_steps_and_an_exact_resume(on_one_device: Path, tmp_path: Path, fraction: float) -> None:
    setup, whole = made(True, fraction), tmp_path / "whole"
    ranks(2).run(on_ranks.train, setup, whole)
    assert records(whole) == records(on_one_device)
    run = copy_until(whole, tmp_path / "run", 2)
    assert ranks(2).run(on_ranks.train, setup, run) == [2, 2]
    assert records(run) == records(whole)
    assert_same(tensors(checkpoint(run, 4)), tensors(checkpoint(whole, 4)))


def test_a_fraction_leaves_the_rest_on_the_gpu(tmp_path: Path) -> None:
    """Whole weights are moved until the fraction is reached."""
    for host, gpu in ranks(2).run(on_ranks.devices, made(True, 0.5), tmp_path):
        assert 0.5 <= host / (host + gpu) < 1.0


def test_verify_starts_from_the_weights_it_is_given(tmp_path: Path) -> None:
    ranks(2).run(on_ranks.verify_layout, made(True), 2, tmp_path)
    (report,) = ranks(1).run(verify_on_ranks.reference_part, made(False, dp=1), 2, tmp_path, None)
    assert report.passed, report
