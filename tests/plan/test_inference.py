"""`plan --inference`: weights, cache and GPUs of a served model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from plan_experiments import filled

from megatron_moe.cli import main
from megatron_moe.config.errors import InputError
from megatron_moe.plan.inference import heads_of_ranks, serving
from megatron_moe.plan.show import inference_table

ROOT = Path(__file__).parents[2]
SKYWORK = str(ROOT / "configs" / "skywork_moe_146b.yaml")
LAYERS, WIDTH, HEADS = 52, 4608, 36


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", SKYWORK, "--inference", *arguments]) == 0
    text = capsys.readouterr().out
    return text if "--json" in arguments else " ".join(text.split())


def test_skywork_moe_in_fp8_takes_146_of_192_gigabytes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--dtype", "fp8", "--json", "launch.cluster.preset=rtx4090")
    record = json.loads(asked(capsys, "--gpus", "8", *options))
    assert record["weights_bytes"] == pytest.approx(146e9, rel=0.01)
    assert record["memory_bytes"] == 192 * 2**30
    assert record["fits"] and record["gpus_needed"] == 8
    assert [rank["query_heads"] for rank in record["ranks"]] == [5, 5, 5, 5, 4, 4, 4, 4]
    assert [rank["kv_heads"] for rank in record["ranks"]] == [5, 5, 5, 5, 4, 4, 4, 4]
    assert record["cache_bytes_per_token"] == LAYERS * 2 * WIDTH * 2
    assert json.loads(asked(capsys, *options))["gpus"] == 8, "as few as do, without --gpus"


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = asked(capsys, "--gpus", "8", "--dtype", "fp8", "launch.cluster.preset=rtx4090")
    assert "It fits with 1 x 8,192 tokens. Fewer GPUs would not do." in text
    assert "146.4 GB = 136.4 GiB of 192 GiB (8 x 24.0 GiB)" in text
    assert "958.5 KB a token in bf16" in text
    text = asked(capsys, "--gpus", "4", "--dtype", "fp8", "launch.cluster.preset=rtx4090")
    assert "It does not fit: 1 x 8,192 tokens need" in text and "8 GPUs would do." in text


def test_weights_and_cache_add_up_on_every_rank() -> None:
    experiment = filled(
        model={"num_attention_heads": 6, "num_query_groups": 6}, launch={"cluster": {"preset": "h100"}}
    )
    one, four = serving(experiment, 1), serving(experiment, 4)
    # Norms and gates, in bf16, are on every rank: two norms and a gate a layer, the final norm.
    copied = 2 * (4 * (64 + 64 + 64 * 8) + 64)
    assert four.weights_bytes == one.weights_bytes + 3 * copied
    assert four.cache_bytes_per_token == one.cache_bytes_per_token == 4 * 2 * 6 * 16 * 2
    assert [rank.query_heads for rank in four.ranks] == [2, 2, 1, 1]


def test_fp8_halves_matrices_alone() -> None:
    experiment = filled(launch={"cluster": {"preset": "h100"}})
    high, low = (serving(experiment, 1, dtype=dtype).weights_bytes for dtype in ("bf16", "fp8"))
    kept = 2 * (4 * (64 + 64 + 64 * 8) + 64)
    assert low - kept == (high - kept) / 2


@pytest.mark.parametrize(
    ("heads", "groups", "ranks", "dealt"),
    [
        (36, 36, 8, [(5, 5)] * 4 + [(4, 4)] * 4),
        (32, 8, 8, [(4, 1)] * 8),
        (32, 8, 3, [(12, 3), (12, 3), (8, 2)]),
        (8, 2, 4, [(2, 1)] * 4),
        (6, 2, 4, [(2, 1), (2, 2), (1, 1), (1, 1)]),
    ],
)
def test_heads_are_dealt_with_the_keys_that_they_read(
    heads: int, groups: int, ranks: int, dealt: list[tuple[int, int]]
) -> None:
    assert heads_of_ranks(heads, groups, ranks) == dealt
    assert sum(queries for queries, _ in dealt) == heads


def test_latent_attention_caches_the_compressed_width_on_every_rank() -> None:
    latent = {"kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}
    model = {"multi_latent_attention": latent, "num_query_groups": 4, "kv_channels": 24}
    found = serving(filled(model=model, launch={"cluster": {"preset": "h100"}}), 2)
    assert {rank.cache_bytes_per_token for rank in found.ranks} == {4 * (32 + 8) * 2}
    assert {rank.kv_heads for rank in found.ranks} == {0}


def test_the_room_for_tokens_is_used_up_to_the_last() -> None:
    experiment = filled(launch={"cluster": {"preset": "h100", "memory_gib": 0.01, "reserved_gib": 0.001}})
    most = serving(experiment, 2).most_tokens
    assert most
    assert serving(experiment, 2, batch=1, context=most).fits
    assert not serving(experiment, 2, batch=1, context=most + 1).fits


@pytest.mark.parametrize(
    ("gpus", "says"),
    [(3, "--gpus 3 does not divide .*: use 2 or 4"), (64, "the model has 4: use at most 4")],
)
def test_gpus_that_cannot_share_the_model_are_refused(gpus: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        serving(filled(launch={"cluster": {"preset": "h100"}}), gpus)


def test_a_model_that_fits_nowhere_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    experiment = filled(launch={"cluster": {"preset": "h100", "memory_gib": 0.0007, "reserved_gib": 0.00065}})
    inference_table.run(
        SimpleNamespace(experiment=experiment), None, False, batch=1, context=None, dtype="bf16"
    )
    assert "No number of these GPUs would do." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch", "2"], "--batch goes with --inference only"),
        (["--inference", "--plot", "x.png"], "--inference does not go with --plot"),
        (["--schedules", "--json"], "--schedules is a table"),
    ],
)
def test_options_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["plan", SKYWORK, *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
