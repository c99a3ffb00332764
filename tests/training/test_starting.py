"""Runs that start from a model: its weights exactly, in any layout and precision, and nothing else of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import starting_on_ranks as on_ranks
import torch
import train_on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout
from training_runs import checkpoint

from megatron_moe.convert.models import open_model

TRAINING = {"train_iters": 2, "global_batch_size": 4}
HELD_STILL = {"lr": 1e-12}
"""A learning rate that moves no weight: what is there behind a step was there before it."""
BIASED = {**MOE, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
TARGETS = ["attention", "mlp", "shared_experts", "experts"]
BOTH_KINDS = {**MOE, "moe_layer_freq": [0, 1, 0, 1], "moe_shared_expert_intermediate_size": 32}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps, by two ranks."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    ranks(2).run(train_on_ranks.train, experiment(BIASED, parallel=layout(tp=2), training=TRAINING), run)
    return run


@pytest.mark.second_pair
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_weights_in_another_layout(trained: Path, tmp_path: Path, precision: str) -> None:
    made = experiment(
        BIASED,
        parallel=layout(pp=2),
        # A frozen router keeps its biases, too.
        training=TRAINING | {"precision": precision, "seed": 99, "freeze": ["router"]},
        checkpoint={"initialize_from": str(trained)},
        optimizer=HELD_STILL | {"weight_decay": 0.0},
    )
    source = open_model(trained).weights
    for before, _, pieces in ranks(2).run(on_ranks.one_step, made, tmp_path / "run"):
        assert before == 0
        for piece in pieces:
            if "balancing" in piece.name:
                continue
            name = piece.name.replace(".experts.experts.", ".experts.")
            if "[expert " in name:
                name, _, number = name.removesuffix("]").partition("[expert ")
                name = name.replace(".experts.", f".experts.{number}.")
            expected = source.read(name)[piece.where].to(piece.data.dtype)
            # In float32 the smallest ones move by the last digit.
            assert torch.allclose(piece.data, expected, rtol=0, atol=1e-10), name


def test_a_run_with_checkpoints_goes_on_from_those(trained: Path, tmp_path: Path) -> None:
    def made(iterations: int, source: Path):
        training = TRAINING | {"train_iters": iterations}
        return experiment(BIASED, training=training, checkpoint={"initialize_from": str(source)})

    run = tmp_path / "run"
    assert ranks(1).run(train_on_ranks.train, made(2, trained), run) == [0]
    about = json.loads((checkpoint(run, 2) / "about.json").read_text())
    assert about["initialized_from"] == str(trained)
    ((before, _, _),) = ranks(1).run(on_ranks.one_step, made(4, tmp_path / "gone"), run)
    assert before == 2


def test_a_merged_model_computes_what_the_adapted_one_does(tmp_path: Path) -> None:
    lora = {"lora": {"rank": 4, "alpha": 16.0, "targets": TARGETS}}
    adapted = experiment(BOTH_KINDS, parallel=layout(tp=2), training=TRAINING | lora, optimizer=HELD_STILL)
    losses = ranks(2).run(on_ranks.save_with_adapters, adapted, tmp_path / "adapted")
    merged = experiment(
        BOTH_KINDS,
        training=TRAINING | {"seed": 1234},
        checkpoint={"initialize_from": str(tmp_path / "adapted")},
        optimizer=HELD_STILL,
    )
    ((_, loss, _),) = ranks(1).run(on_ranks.one_step, merged, tmp_path / "merged")
    ((_, base, _),) = ranks(1).run(
        on_ranks.one_step,
        experiment(BOTH_KINDS, training=TRAINING, optimizer=HELD_STILL),
        tmp_path / "base",
    )
    assert loss == pytest.approx(losses[0], rel=1e-6)
    assert abs(base - loss) > 1e-3


def test_adapters_change_nothing_at_first(trained: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 4, "targets": ["attention", "experts"]}}
    made = [
        experiment(BIASED, training=TRAINING | more, checkpoint={"initialize_from": str(trained)})
        for more in ({}, lora)
    ]
    losses = [ranks(1).run(on_ranks.one_step, one, tmp_path / "run")[0][1] for one in made]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_is_frozen_has_no_gradient_and_no_moments(tmp_path: Path) -> None:
    made = experiment(training=TRAINING | {"freeze": ["attention", "embeddings", "output", "norms"]})
    ((names, moments),) = ranks(1).run(on_ranks.names_of_trained, made, tmp_path / "run")
    kinds = {name.split(".mlp.")[1].split("[")[0] for name in names}
    assert kinds == {
        "router.weight",
        "experts.experts.linear_fc1.weight",
        "experts.experts.linear_fc2.weight",
    }
    # Router [4, 32], and in each of 4 experts [2 x 48, 32] and [32, 48], in each of 4 layers.
    assert moments == 4 * (4 * 32 + 4 * (2 * 48 * 32 + 32 * 48))
