"""Attention scores of s x s that would not fit are refused before ranks start."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.engine.machine import Gpu, Machine
from megatron_moe.launch import preflight

EXPERIMENT = """\
name: small
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, attention_dropout: 0.1}
data: {kind: mock, tokenizer: {kind: bytes}}
training: {train_iters: 2, global_batch_size: 4, seq_length: 4096}
"""
GIB = 2**30
SCORES = 4 * 3 * 4 * 4 * 4096**2  # layers, copies, heads, bytes, pairs: 3 GiB


def found(folder: Path, machine: Machine, *overrides: str) -> list[str]:
    path = folder / "small.yaml"
    path.write_text(EXPERIMENT)
    try:
        preflight.check(load(path, overrides), machine)
    except InputError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("memory", "overrides", "refused"),
    [
        (SCORES, [], False),
        (SCORES - 1, [], True),
        (SCORES, ["training.micro_batch_size=2"], True),
        (SCORES, ["parallel.data_parallel_size=2"], True),
        (SCORES, ["parallel.context_parallel_size=2"], False),
        (SCORES // 4, ["recompute.granularity=full"], False),
        (SCORES // 4, ["recompute.modules=[core_attn]"], False),
        (GIB // 2, ["recompute.granularity=full"], True),
        (1, ["model.attention_dropout=0"], False),
    ],
)
def test_what_fits(tmp_path: Path, memory: int, overrides: list[str], refused: bool) -> None:
    assert bool(found(tmp_path, Machine(memory_bytes=memory), *overrides)) is refused


def test_the_line_names_the_keys_that_help(tmp_path: Path) -> None:
    (line,) = found(tmp_path, Machine(memory_bytes=GIB))
    for words in (
        "small.yaml:2: model.attention_dropout: 0.1 needs the scores",
        "training.seq_length (4096",
        "training.micro_batch_size (1",
        "at least 3 GiB, and this machine has 1 GiB; set it to 0, or recompute.granularity to full",
    ):
        assert words in line


def test_gpus_spare_the_scores(tmp_path: Path) -> None:
    machine = Machine(memory_bytes=1, gpus=(Gpu("H100", 80 * GIB, (9, 0)),), torch_cuda="13")
    assert found(tmp_path, machine) == []
