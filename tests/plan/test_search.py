"""`plan --search` finds what trying everything finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from plan_experiments import filled

from megatron_moe import cli
from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.config.rules import violations
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.assembly import assemble
from megatron_moe.plan.auto import placed
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.plan import make
from megatron_moe.plan.search.estimate import Estimates
from megatron_moe.plan.search.search import search
from megatron_moe.plan.search.space import candidates, with_candidate
from megatron_moe.plan.times.cluster import Cluster

MODEL = {
    "num_layers": 6,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "kv_channels": 128,
    "ffn_hidden_size": 8192,
    "vocab_size": 64000,
    "max_position_embeddings": 4096,
}
TRAINING = {"train_iters": 10, "global_batch_size": 32, "seq_length": 4096, "precision": "bf16"}
CONFIG = """
name: searched
model: {num_layers: 6, hidden_size: 2048, num_attention_heads: 16, vocab_size: 64000}
moe: {num_moe_experts: 8, moe_router_topk: 2, moe_ffn_hidden_size: 4096}
data: {kind: mock}
recompute: {modules: [moe_act]}
pipeline: {num_layers_in_first_stage: 6}
training: {train_iters: 10, global_batch_size: 32, seq_length: 4096, precision: bf16}
launch: {cluster: {preset: h100}}
"""


def searched(memory_gib: float | None = None, **sections: object) -> Experiment:
    cluster = {"preset": "h100"} | ({"memory_gib": memory_gib} if memory_gib else {})
    return filled(
        **{  # type: ignore[arg-type]
            "model": MODEL,
            "moe": {"num_moe_experts": 8, "moe_ffn_hidden_size": 4096},
            "pipeline": {"layers_per_stage": [6]},
            "training": TRAINING,
            "data": {"kind": "mock"},
            "launch": {"cluster": cluster},
            **sections,
        }
    )


def seconds_of_all(experiment: Experiment, gpus: int) -> list[float]:
    """An iteration of each candidate that fits, placed and simulated by itself."""
    found = []
    for candidate in candidates(experiment, gpus, gpus_per_node=8):
        try:
            changed = placed(with_candidate(experiment, candidate), None)
        except InputError:
            continue
        forecast = make(changed).forecast
        if all((rank.memory.headroom or 0) >= 0 for rank in forecast.ranks):
            found.append(forecast.iteration_s)
    return sorted(found)


@pytest.mark.parametrize("memory_gib", [None, 24.0])
def test_the_best_is_the_best_of_all(memory_gib: float | None) -> None:
    experiment = searched(memory_gib)
    everything = seconds_of_all(experiment, gpus=4)
    found = search(experiment, gpus=4)
    assert found.best[0].forecast.iteration_s == pytest.approx(everything[0])
    times = [one.forecast.iteration_s for one in found.best]
    assert times == sorted(times) and len(times) == 10
    assert all((rank.memory.headroom or 0) >= 0 for one in found.best for rank in one.forecast.ranks)


def test_nothing_fits_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"no layout of 2 GPUs fits; the nearest, TP .* needs .* GiB more"):
        search(searched(memory_gib=5.0), gpus=2)


def test_the_overlay_runs_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, overlay = tmp_path / "searched.yaml", tmp_path / "more" / "best.yaml"
    config.write_text(CONFIG)
    overlay.parent.mkdir()
    options = ["--search", "--gpus", "8", "--overlay", str(overlay)]
    assert cli.main(["plan", str(config), *options, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["best"][0]
    plan = make(load(overlay).experiment)
    assert plan.layout.world_size == 8
    assert plan.forecast.iteration_s == pytest.approx(best["forecast"]["iteration_s"])
    assert [len(stage.layers) for stage in plan.stages] == best["layers_per_stage"]
    assert cli.main(["plan", str(config), *options]) == 0
    table = capsys.readouterr().out
    assert "…" not in table and "searched on 8 GPUs" in table and "The first one is written to" in table


def test_microbatches_are_merged_where_the_layout_allows_it(tmp_path: Path) -> None:
    """An experiment that overlaps its experts' exchange is searched with it and without."""
    config, overlay = tmp_path / "searched.yaml", tmp_path / "best.yaml"
    merged = "overlap_moe_expert_parallel_comm: true, moe_permute_fusion: true"
    own = f"moe_ffn_hidden_size: 4096, moe_token_dispatcher_type: alltoall, {merged}"
    ranks = "parallel: {expert_model_parallel_size: 2}\n"
    config.write_text(CONFIG.replace("moe_ffn_hidden_size: 4096", own) + ranks)
    assert cli.main(["plan", str(config), "--search", "--gpus", "8", "--overlay", str(overlay)]) == 0
    assert make(load(overlay).experiment).layout.world_size == 8
    experiment = load(config).experiment
    allowed = [with_candidate(experiment, one) for one in candidates(experiment, 8, 8)]
    with_it = [one for one in allowed if one.moe and one.moe.overlap_moe_expert_parallel_comm]
    assert with_it and len(with_it) < len(allowed)
    assert not any(violations(one) for one in with_it)


@pytest.mark.parametrize("overlapped", [False, True])
def test_what_layouts_share_is_what_each_costs_by_itself(overlapped: bool) -> None:
    """A search counts a piece once for all layouts in which it is the same."""
    moe = {
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 4096,
        "moe_token_dispatcher_type": "alltoall",
        "overlap_moe_expert_parallel_comm": overlapped,
    }
    experiment = searched(moe=moe)
    cluster = Cluster.of(experiment)
    shared = Estimates(experiment, cluster)
    for candidate in candidates(experiment, 16, 8):
        changed = with_candidate(experiment, candidate)
        layout = Layout.of(changed)
        alone = assemble(changed, layout, cluster, None)
        assert shared.units(candidate, changed, layout) == alone, candidate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "--gpus", "8", "--overlay", "{folder}/searched.yaml"], "name another file"),
        (["--search"], "--search needs --gpus"),
        (["--memory", "40"], "--memory goes with --search only"),
        (["--search", "--gpus", "37"], "no layout of 37 ranks"),
        (["--search", "--gpus", "8", "--overlay", "{folder}"], "is a folder"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    config = tmp_path / "searched.yaml"
    config.write_text(CONFIG)
    given = [option.format(folder=tmp_path) for option in options]
    assert cli.main(["plan", str(config), *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_searching_imports_no_torch() -> None:
    import subprocess

    code = "import sys, megatron_moe.plan.show.search_command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table_is_narrower_than_100_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every column there is."""
    monkeypatch.setenv("COLUMNS", "200")
    config = tmp_path / "searched.yaml"
    config.write_text(CONFIG.replace("seq_length: 4096", "seq_length: 32768"))
    assert cli.main(["plan", str(config), "--search", "--gpus", "32"]) == 0
    text = capsys.readouterr().out
    table = text.split("what it waits for")[1].split("The first one takes")[0].splitlines()
    assert max(map(len, table)) < 100
    assert "…" not in text
