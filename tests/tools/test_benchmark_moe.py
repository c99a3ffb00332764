"""The benchmark of the MoE layer measures layers that compute the same, and says what it left out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from distributed import REPOSITORY
from moe_peers.contender import Shape

TOOL = REPOSITORY / "tools" / "benchmark_moe.py"
ALONE = ["ours", "ours, gradients into Megatron-Core's buffer", "loop over tokens", "loop over weight[i]"]
SPREAD = [
    "ours: EDP (EP = all ranks), all-to-all",
    "ours: EDP, each token once a rank",
    "ours: EDP, all-gather",
    "ours: ETP = all ranks, all-to-all",
    "ours: ETP = all ranks, all-gather",
]


@pytest.mark.slow
@pytest.mark.second_pair
@pytest.mark.parametrize("ranks", [1, 2])
def test_all_take_part_and_agree(ranks: int) -> None:
    """It ends with an error where a contender computes something else."""
    arguments = ["--ranks", str(ranks), "--device", "cpu", "--shape", "4,2,16,24,32", "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(TOOL), *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    names = [row[0] for row in rows]
    for name in (*(ALONE if ranks == 1 else SPREAD), "Megatron-Core, SequentialMLP", "dense layer"):
        assert name in names
    for package, row in (("transformers", "transformers Qwen3-MoE, eager"), ("Tutel", "Tutel, dropless")):
        said = f"Left out: {package} is not installed" in run.stdout
        assert said != (row in names) or (package == "transformers" and ranks > 1)


def test_the_bytes_of_the_floor_by_hand() -> None:
    """2 experts of 3 x 4 x 5 weights, read twice and written once; 6 x 2 rows of 4, moved four times."""
    shape = Shape.parse("2,2,4,5,6")
    assert shape.moved_bytes(4) == 4 * (3 * 2 * 60 + 4 * 2 * 12 * 4)
    # 12 rows through three products of 4 x 5, forward and twice that backward.
    assert shape.flops == 12 * 3 * (2 * 4 * 5) * 3
