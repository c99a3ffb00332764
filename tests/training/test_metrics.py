"""metrics.jsonl: the keys of the contract, the same numbers in every layout, and numbers that are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import train_on_ranks as on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout
from training_runs import TIMES as MEASURED

from megatron_moe.training.callbacks.metrics_file import MetricsFile, cut_back

TIMES = set(MEASURED)
MIXED = {**MOE, "moe_layer_freq": [0, 0, 1, 1]}
ALWAYS = {"iteration", "loss", "grad_norm", "lr", "consumed_tokens"}
EVERY_STEP = {
    f"moe/{name}"
    for name in (
        "aux_loss",
        "loss/aux_loss",
        "z_loss",
        "drop_rate",
        "load_max_over_mean",
        "dead_experts",
        "router_entropy",
    )
}
PER_LAYER = {
    f"moe/per_layer/{name}"
    for name in (
        "drop_rate",
        "aux_loss_coeff",
        "load_max_over_mean",
        "dead_experts",
        "router_entropy",
        "top1_over_top2",
        "top2_over_top3",
    )
}
WOULD_DROP = {"moe/would_drop_rate", "moe/per_layer/would_drop_rate"}


def lines(run: Path) -> list[dict[str, Any]]:
    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return [
        json.loads(line, parse_constant=no_constant)
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def test_the_keys_of_each_kind_of_model(tmp_path):
    def made(moe: dict | None, **sections):
        return experiment(moe, logging={"detail_interval": 2}, training={"train_iters": 2}, **sections)

    names = ("mixed", "dense", "dropping")
    ranks(1).run(
        on_ranks.train_all,
        [
            (made(MIXED), tmp_path / "mixed"),
            (made(None), tmp_path / "dense"),
            (made(MOE | {"moe_expert_capacity_factor": 0.5}), tmp_path / "dropping"),
        ],
    )
    mixed, dense, dropping = (lines(tmp_path / name) for name in names)

    assert [record["iteration"] for record in mixed] == [1, 2]
    assert mixed[0].keys() - TIMES == ALWAYS | EVERY_STEP | {"moe/would_drop_rate"}
    assert mixed[1].keys() - TIMES == ALWAYS | EVERY_STEP | PER_LAYER | WOULD_DROP
    for key in PER_LAYER | {"moe/per_layer/would_drop_rate"}:
        assert len(mixed[1][key]) == 4 and mixed[1][key][:2] == [None, None], key
        assert all(isinstance(value, float | int) for value in mixed[1][key][2:]), key
    assert mixed[1]["moe/drop_rate"] == 0 and mixed[1]["moe/per_layer/drop_rate"][2:] == [0, 0]
    assert mixed[1]["moe/per_layer/aux_loss_coeff"][2:] == [0.01, 0.01]
    assert all(ratio > 1 for ratio in mixed[1]["moe/per_layer/top1_over_top2"][2:])
    assert mixed[1]["consumed_tokens"] == 2 * 8 * 32

    assert all(record.keys() - TIMES == ALWAYS for record in dense)

    assert dropping[1].keys() - TIMES == ALWAYS | EVERY_STEP | PER_LAYER
    # With half the room that is needed at perfect balance at least half is dropped.
    assert all(0.5 <= record["moe/drop_rate"] < 1 for record in dropping)
    assert dropping[1]["moe/drop_rate"] == pytest.approx(sum(dropping[1]["moe/per_layer/drop_rate"]) / 4)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EDP": (2, {"parallel": layout(tp=2)}),
    "DP2 x EP2": (2, {"parallel": layout(dp=2, expert_model_parallel_size=2)}),
    "PP2, first stage dense": (2, {"parallel": layout(pp=2)}),
    "PP2 x VPP2": (2, {"parallel": layout(pp=2, vpp=2)}),
    "recompute": (1, {"recompute": {"layers_per_stage": [4]}}),
}
COUNTED = ("moe/drop_rate", "moe/would_drop_rate", "moe/load_max_over_mean", "moe/dead_experts")


@pytest.fixture(scope="module", params=["dropless", "capacity 1.0"])
def model(request) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The MoE section, and the records of one process."""
    moe = {**MIXED, "num_moe_experts": 8, "moe_router_topk": 3}
    if request.param != "dropless":
        moe["moe_expert_capacity_factor"] = 1.0
    return moe, ranks(1).run(on_ranks.steps, made(moe), Path(), 2)[0]


def made(moe: dict[str, Any], **sections: Any):
    return experiment(moe, logging={"detail_interval": 1}, **sections)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_measures_the_same(model, name):
    moe, expected = model
    world_size, sections = LAYOUTS[name]
    for records in ranks(world_size).run(on_ranks.steps, made(moe, **sections), Path(), 2):
        for step, (record, reference) in enumerate(zip(records, expected, strict=True)):
            assert record.keys() - TIMES == reference.keys() - TIMES
            for key in reference.keys() - TIMES:
                # The second step's routing may turn over at a tie of two logits.
                if step == 0 and key in COUNTED:
                    assert record[key] == reference[key], key
                else:
                    assert record[key] == pytest.approx(reference[key], rel=1e-6, nan_ok=True), key


def test_the_loss_is_the_cross_entropy_of_the_logits():
    for moe in (MOE, None):
        recorded, by_hand = ranks(1).run(on_ranks.losses_by_hand, experiment(moe), Path())[0]
        assert recorded == pytest.approx(by_hand, rel=1e-6)


def test_a_step_with_a_broken_gradient_or_without_targets_is_skipped_everywhere():
    results = ranks(2).run(on_ranks.with_a_broken_gradient, experiment(parallel=layout(tp=2)), Path())
    for steps in results:
        assert [step["changed"] for step in steps] == [True, False, True, False]
        assert "skipped" not in steps[0]["record"] and "skipped" not in steps[2]["record"]
        broken = steps[1]["record"]
        assert broken["skipped"] == "the gradient norm is not finite"
        assert broken["grad_norm"] is None and math.isfinite(broken["loss"])
        assert steps[3]["record"]["skipped"] == "no token of the batch is a target"
        assert steps[3]["record"]["loss"] is None
        assert broken["iteration"] == 2 and steps[2]["record"]["iteration"] == 3


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ("", 3),
        ('{"iteration": 4, "lo', 3),
        ('{"iteration": 4}', 3),
        ("\0\0\0\0\n", 3),
        ('{"iteration": 4}\n{"iteration": 5}\n', 3),
    ],
)
def test_the_file_is_cut_back_to_the_checkpoint(tmp_path, tail, kept):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(f'{{"iteration": {number}}}\n' for number in range(1, 4))
    path.write_text(whole + tail)
    assert cut_back(path, 3) == kept
    assert path.read_text() == whole
    cut_back(path, 0)
    assert path.read_text() == ""
    cut_back(tmp_path / "nothing", 0)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("text", "done", "said"),
    [
        (
            '{"iteration": 1}\n{"iteration": 2}\n\0\0\n{"iteration": 4}\n',
            4,
            "steps 3 to 4; it goes on at step 5",
        ),
        ('{"iteration": 1}\n{"iteration": 2', 2, "step 2; it goes on at step 3"),
        ('{"iteration": 1}\n{"iteration": 2}\n{"iter', 2, None),
        (None, 3, "steps 1 to 3; it goes on at step 4"),
        (None, 0, None),
    ],
)
def test_steps_that_the_file_lost_are_said(tmp_path, capsys, text, done, said):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    file = MetricsFile(path, tmp_path / "log.txt")
    trainer: Any = SimpleNamespace(iteration=done)
    file.on_start(trainer)
    file.on_end(trainer)
    expected = "" if said is None else f"metrics.jsonl: no readable record of {said}\n"
    assert capsys.readouterr().out == expected
