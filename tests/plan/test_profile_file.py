"""Files of `megatron-moe profile`, and those that are about something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from experiments import experiment, layout

from megatron_moe.config.errors import InputError
from megatron_moe.plan import devices, plan, profile
from megatron_moe.plan.profile import Piece, Profile

PIECE = Piece(0.001, 0.002, 0.0009, 0.0008, 0.0001, 0.0002, 1000.0, 100.0, 500.0)
MADE = {"parallel": layout(pp=2)}


def profiled(made, **changes):
    """A measurement of an experiment on this machine."""
    measured = Profile(
        settings=profile.settings_of(made),
        device=devices.processor(),
        on_host=True,
        ranks=2,
        threads=1,
        versions={"torch": "2.13.0"},
        pieces={"embedding": PIECE, "moe": PIECE, "head": PIECE},
        optimizer_s=0.01,
        optimizer_parameters=1000,
    )
    return replace(measured, **changes)


def in_folder(folder: Path, **more):
    return experiment(**{**MADE, **more, "logging": {"root": str(folder)}})


def test_what_was_written_is_read_again(tmp_path):
    made = in_folder(tmp_path / "runs")
    written = profiled(made)
    # The run folder need not be there.
    written.write(profile.path_of(made))
    assert profile.path_of(made) == tmp_path / "runs" / "tiny" / "profile.json"
    assert profile.read(profile.path_of(made)) == written == profile.profile_of(made)
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["profile.json"]


def test_forecasts_are_made_of_measured_times(tmp_path):
    made = in_folder(tmp_path)
    profiled(made).write(profile.path_of(made))
    forecast = plan.make(made).forecast
    # Two layers a stage, beside embedding and head.
    assert [rank.forward_s for rank in forecast.ranks] == pytest.approx([0.003, 0.003])
    assert [rank.backward_s for rank in forecast.ranks] == pytest.approx([0.006, 0.006])
    assert "measurements on" in forecast.source
    # Ten microseconds a parameter; one replica updates all that its stage holds.
    held = max(cost.parameters_per_rank for cost in plan.make(made).stage_costs)
    assert forecast.optimizer_s == pytest.approx(held * 1e-5)
    again = in_folder(tmp_path, recompute={"layers_per_stage": [2, 1]})
    backward = [rank.backward_s for rank in plan.make(again).forecast.ranks]
    assert backward == pytest.approx([0.0078, 0.0069])


def test_no_profile_is_no_mistake(tmp_path):
    assert profile.profile_of(in_folder(tmp_path)) is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size 32 (here 64)"),
        ({"training": {"seq_length": 64}}, "training.seq_length 32 (here 64)"),
        ({"training": {"micro_batch_size": 4}}, "training.micro_batch_size 2 (here 4)"),
        ({"moe": None}, "moe.num_moe_experts 4 (here null)"),
        ({"parallel": layout(pp=4)}, "2 ranks at once (here 4)"),
        ({"launch": {"cluster": {"preset": "h800"}}}, "(here launch.cluster.preset h800)"),
    ],
)
def test_a_profile_of_something_else_is_refused_in_one_line(tmp_path, more, words):
    other = tmp_path / "other.json"
    profiled(in_folder(tmp_path)).write(other)
    launch = more.get("launch", {}) | {"profile": str(other)}
    with pytest.raises(InputError) as error:
        profile.profile_of(in_folder(tmp_path, **(more | {"launch": launch})))
    (line,) = error.value.problems
    assert words in line and "\n" not in line
    assert line.startswith(str(other))
    assert "run `megatron-moe profile` for this experiment, or leave out launch.profile" in line


def test_a_profile_in_the_run_folder_stops_no_other_layout(tmp_path):
    made, other = in_folder(tmp_path), in_folder(tmp_path, parallel=layout(pp=4))
    profiled(made).write(profile.path_of(made))
    assert profile.not_taken(made) is None
    assert profile.profile_of(other) is None
    assert plan.make(other).forecast == plan.make(other, profiled=False).forecast
    said = profile.not_taken(other)
    assert said is not None and "2 ranks at once (here 4)" in said


def test_depth_replicas_and_losses_change_no_piece(tmp_path):
    profiled(in_folder(tmp_path)).write(tmp_path / "tiny" / "profile.json")
    deeper = {
        "model": {"num_layers": 8, "init_method_std": 0.02},
        "moe": {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.1},
        "recompute": {"layers_per_stage": [1, 0]},
    }
    assert profile.profile_of(in_folder(tmp_path, **deeper)) is not None


def test_missing_pieces_and_other_devices_are_named(tmp_path):
    made = in_folder(tmp_path)
    dense_first = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_first_k_dense_layers": 1}
    profiled(made).write(tmp_path / "other.json")
    of_other = {"profile": str(tmp_path / "other.json")}
    with pytest.raises(InputError, match="no piece of the kind `dense`"):
        profile.profile_of(in_folder(tmp_path, moe=dense_first, launch=of_other))
    profiled(made, device="NVIDIA H800").write(tmp_path / "other.json")
    with pytest.raises(InputError, match=r"NVIDIA H800 \(here .*\).*or leave out launch.profile"):
        profile.profile_of(in_folder(tmp_path, launch={"profile": str(tmp_path / "other.json")}))
    # On a login node, a preset says for which machines is planned.
    h800 = {"profile": str(tmp_path / "other.json"), "cluster": {"preset": "h800"}}
    profiled(in_folder(tmp_path, launch=h800), device="NVIDIA H800", on_host=False).write(
        tmp_path / "other.json"
    )
    assert profile.profile_of(in_folder(tmp_path, launch=h800)) is not None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "pieces": {"odd": 1}}']
)
def test_torn_files_are_refused(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"is no profile, or a torn one"):
        profile.read(path)


def test_files_of_other_versions_are_refused(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="another version"):
        profile.read(path)
    with pytest.raises(InputError, match="cannot be read"):
        profile.read(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("parallel", "on_host", "ranks"),
    [
        (layout(pp=2), True, 2),
        (layout(pp=2), False, 1),
        (layout(tp=2, pp=2, dp=4), False, 2),
        (layout(dp=4, expert_model_parallel_size=4), False, 4),
        (layout(tp=2, dp=4, expert_model_parallel_size=4), False, 4),
        (layout(tp=2, pp=2, dp=2, expert_model_parallel_size=2), True, 8),
    ],
)
def test_ranks_of_a_measurement(parallel, on_host, ranks):
    made = experiment(parallel=parallel)
    assert profile.ranks_at_once(made, on_host) == ranks
