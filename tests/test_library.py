"""The library as its page and its example show it, and what importing it costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_moe

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, megatron_moe\n"
        "assert 'moefy' in dir(megatron_moe)\n"
        "print([name for name in ('torch', 'megatron', 'numpy', 'pydantic') if name in sys.modules])"
    )
    done = run("-c", program)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_name_is_there() -> None:
    for name in megatron_moe.__all__:
        assert getattr(megatron_moe, name).__module__.startswith("megatron_moe.")
    with pytest.raises(AttributeError, match="no attribute 'moefied'"):
        megatron_moe.moefied  # noqa: B018


@pytest.mark.second_pair
def test_the_blocks_of_the_page_run() -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    done = run("-c", "\n".join(blocks))
    assert (done.returncode, done.stderr) == (0, "")
    assert "topk: 5 is more than num_experts (4); use at most 4" in done.stdout


@pytest.mark.parametrize("options", [[], ["--hugging-face"]], ids=["PyTorch", "Hugging Face"])
def test_the_example_trains(options: list[str]) -> None:
    done = run("examples/moefy.py", "--steps", "20", *options)
    assert (done.returncode, done.stderr) == (0, "")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 2 and losses[1] < losses[0] - 1.5
    assert len(re.findall(r"router: load max/mean \d+\.\d\d", done.stdout)) == 4


def test_the_example_trains_on_two_ranks() -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(*launch, "examples/moefy.py", "--expert-parallel", "2", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 1: loss")
