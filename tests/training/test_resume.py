"""Going on from a checkpoint: to the bit in the same layout, to rounding in another, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import train_on_ranks as on_ranks
from deepseek_cases import LATENT, TWO
from distributed import ranks
from experiments import MOE, experiment, layout
from training_runs import assert_same, checkpoint, copy_until, records, tensors

EDP = layout(tp=2)
TRAINING = {"train_iters": 4, "global_batch_size": 4}


def close(a: list[dict], b: list[dict]) -> None:
    assert [record["iteration"] for record in a] == [record["iteration"] for record in b]
    assert [record["loss"] for record in a] == pytest.approx([record["loss"] for record in b], rel=1e-6)
    assert [r["grad_norm"] for r in a] == pytest.approx([r["grad_norm"] for r in b], rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "world_size"),
    [
        pytest.param({"parallel": EDP, "training": {"precision": "bf16"}}, 2, id="bf16"),
        pytest.param(
            {
                "parallel": layout(pp=2),
                "pipeline": {"layers_per_stage": [3, 1]},
                "recompute": {"layers_per_stage": [2, 0]},
                "model": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
            },
            2,
            id="PP2, uneven, recompute, dropout",
        ),
        pytest.param({"parallel": layout(dp=2), "moe": None}, 2, id="DP2, dense"),
        pytest.param(
            {
                "parallel": layout(pp=2),
                "model": {**LATENT, **TWO},
                "moe": {**MOE, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
            },
            2,
            id="PP2, latent attention, further tokens, expert biases",
        ),
        pytest.param(
            {
                "parallel": layout(dp=2, overlap_grad_reduce=True, overlap_param_gather=True),
                "training": {"precision": "bf16", "eval_interval": 1, "eval_iters": 1},
            },
            2,
            id="DP2, overlapped, bf16",
        ),
    ],
)
def test_to_the_bit(tmp_path, sections, world_size):
    training = TRAINING | sections.get("training", {})
    settings = {**sections, "training": training, "checkpoint": {"save_interval": 2}}
    made = experiment(settings.pop("moe", MOE), **settings)
    assert ranks(world_size).run(on_ranks.train, made, tmp_path / "whole") == [0] * world_size
    broken = copy_until(tmp_path / "whole", tmp_path / "broken", 2)
    assert ranks(world_size).run(on_ranks.train, made, broken) == [2] * world_size
    assert records(broken) == records(tmp_path / "whole")
    assert_same(tensors(checkpoint(broken, 4)), tensors(checkpoint(tmp_path / "whole", 4)))


@pytest.mark.second_pair
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_every_step_so_far_was_skipped(tmp_path, precision):
    """The optimizer has made no moments yet."""
    training = {**TRAINING, "precision": precision}
    made = experiment(parallel=EDP, training=training, checkpoint={"save_interval": 2})
    whole = tmp_path / "whole"
    assert ranks(2).run(on_ranks.train_spoiled, made, whole, 2) == [0, 0]
    assert ["skipped" in record for record in records(whole)] == [True, True, False, False]
    broken = copy_until(whole, tmp_path / "broken", 2)
    assert ranks(2).run(on_ranks.train, made, broken) == [2, 2]
    assert records(broken) == records(whole)
    assert_same(tensors(checkpoint(broken, 4)), tensors(checkpoint(whole, 4)))


def test_in_other_layouts(tmp_path):
    def made(parallel: dict, **training):
        return experiment(parallel=parallel, training={"train_iters": 6, "global_batch_size": 4, **training})

    ranks(1).run(on_ranks.train, made(layout()), tmp_path / "one")
    run = tmp_path / "moving"
    assert ranks(2).run(on_ranks.train, made(EDP), run, 2) == [0, 0]
    assert ranks(1).run(on_ranks.train, made(layout()), run, 4) == [2]
    assert ranks(2).run(on_ranks.train, made(layout(pp=2)), run) == [4, 4]
    close(records(run), records(tmp_path / "one"))


def test_a_longer_run_and_fewer_checkpoints(tmp_path):
    def made(train_iters: int, keep: int):
        return experiment(
            training=TRAINING | {"train_iters": train_iters},
            optimizer={"lr": 1e-2, "lr_decay_style": "constant"},
            checkpoint={"save_interval": 1, "keep": keep},
        )

    ranks(1).run(on_ranks.train, made(5, 3), tmp_path / "long")
    run = tmp_path / "grown"
    ranks(1).run(on_ranks.train, made(2, 2), run)
    assert ranks(1).run(on_ranks.train, made(5, 2), run) == [2]
    assert records(run) == records(tmp_path / "long")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "iter_0000004",
        "iter_0000005",
        "latest",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of one process with checkpoints after steps 2 and 4."""
    run = tmp_path_factory.mktemp("finished") / "run"
    ranks(1).run(on_ranks.train, experiment(training=TRAINING, checkpoint={"save_interval": 2}), run)
    return run


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "the content of __0_0.distcp has changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "__0_0.distcp has "),
        (lambda path: (path.parent / "manifest.json").unlink(), "manifest.json: No such file"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_made_again(finished, tmp_path, damage, words):
    run = shutil.copytree(finished, tmp_path / "run")
    damage(checkpoint(run, 4) / "__0_0.distcp")
    made = experiment(training=TRAINING, checkpoint={"save_interval": 2})
    ((began, said),) = ranks(1).run(on_ranks.resumed, made, run)
    assert began == 2
    assert f"iter_0000004 is damaged ({words}" in said and "going on from iter_0000002" in said
    assert (run / "checkpoints" / "damaged_iter_0000004").is_dir()
    assert records(run) == records(finished)
    assert_same(tensors(checkpoint(run, 4)), tensors(checkpoint(finished, 4)))


def test_where_every_checkpoint_is_damaged_nothing_is_begun_anew(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for iteration in (2, 4):
        flip(checkpoint(run, iteration) / "common.pt")
    before = records(run)
    made = experiment(training=TRAINING, checkpoint={"save_interval": 2})
    (words,) = ranks(1).run(on_ranks.refused, made, run)
    assert "no checkpoint of this run is whole" in words and words.count("common.pt has changed") == 2
    assert records(run) == before and len(list((run / "checkpoints").glob("iter_*"))) == 2


def test_what_cannot_be_written_costs_no_checkpoint(tmp_path):
    made = experiment(parallel=EDP, training=TRAINING)
    results = ranks(2).run(on_ranks.saves_on_a_full_disk, made, tmp_path / "run")
    for words, left, saved in results:
        assert "cannot save the checkpoint after step 2: File too large" in words
        assert left == ["iter_0000001", "latest"]
        assert saved == 2
