"""`train` as one rank under torchrun and srun, over a stand-in for training."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from stand_in_training import EXPERIMENT, install
from test_train_alone import MEETS

PROGRAM = "import sys; from megatron_moe.cli import main; sys.exit(main())"


def torchrun(config: Path, *overrides: str, ranks: int = 2) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of torchrun, which ends with a report and a traceback of its own."""
    program = config.parent / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*command, str(program), "train", str(config), *overrides], capture_output=True, text=True
    )
    return result.returncode, result.stdout, result.stderr


def srun(config: Path, *overrides: str, ranks: int = 2) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each task, started with the variables that srun sets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tasks = []
    for rank in range(ranks):
        environment = {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(ranks),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_STEP_TASKS_PER_NODE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        tasks.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "train", str(config), *overrides],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    written = [task.communicate() for task in tasks]
    return [(task.returncode, output, errors) for task, (output, errors) in zip(tasks, written, strict=True)]


def test_torchrun_trains_and_then_says_that_it_is_done(tmp_path, monkeypatch):
    config = install(tmp_path, monkeypatch, MEETS)
    config.write_text(EXPERIMENT.replace("parallel: {data_parallel_size: 2}", ""))
    assert torchrun(config)[0] == 0
    run = tmp_path / "runs" / "small"
    assert [(run / f"total_{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]
    assert "data_parallel_size: 2" in (run / "resolved.yaml").read_text()
    code, output, _ = torchrun(config)
    assert code == 0 and output.count("is finished") == 1


def test_torchrun_says_each_mistake_once(tmp_path, monkeypatch):
    body = "from megatron_moe.config.errors import InputError\nraise InputError('data.split: empty')"
    config = install(tmp_path, monkeypatch, body)
    for arguments, said in (
        (("training.train_iters=none",), "training.train_iters"),
        ((f"logging.root={config}",), "logging.root"),
        ((), "data.split: empty"),
    ):
        code, _, errors = torchrun(config, *arguments)
        assert code != 0
        lines = [line for line in errors.splitlines() if said in line]
        assert len(lines) == 1, errors
        assert "megatron_moe/" not in errors, errors


def test_torchrun_shows_the_cause_and_not_the_lost_connections(tmp_path, monkeypatch):
    body = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
if rank == 1:
    raise ValueError("broken")
dist.all_reduce(torch.ones(1))
"""
    code, _, errors = torchrun(install(tmp_path, monkeypatch, body))
    assert code == 1
    assert "rank 1 failed:\nTraceback" in errors and "ValueError: broken" in errors
    assert "rank 0 failed" not in errors


def test_srun_trains(tmp_path, monkeypatch):
    config = install(tmp_path, monkeypatch, MEETS)
    assert srun(config) == [(0, "", ""), (0, "", "")]
    run = tmp_path / "runs" / "small"
    assert [(run / f"total_{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]


def test_srun_wrong_input_is_said_by_rank_0_and_all_exit_with_2(tmp_path, monkeypatch):
    config = install(tmp_path, monkeypatch)
    (code, output, errors), others = srun(config, f"logging.root={config}")
    assert (code, output) == (2, "") and errors.startswith("logging.root:") and errors.count("\n") == 1
    assert others == (2, "", "")
    (code, _, errors), others = srun(config, "parallel.data_parallel_size=3")
    assert code == 2 and "parallel.data_parallel_size" in errors
    assert others == (2, "", "")


def test_a_full_disk_is_one_line_and_exit_code_1(tmp_path, monkeypatch):
    """In a rank's training, and before it, where rank 0 writes the run's files."""
    in_training = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
if rank == 1:
    raise OSError(28, "No space left on device", "metrics.jsonl")
dist.all_reduce(torch.ones(1))
"""
    before = """
import pathlib
def full(*arguments, **keywords):
    raise OSError(28, "No space left on device")
pathlib.Path.write_text = full
"""
    for body, line in (
        (
            in_training,
            "rank 1: cannot write metrics.jsonl: No space left on device; make room and start again",
        ),
        (
            "pass",
            "cannot write to the run folder runs/small: No space left on device; make room and start again",
        ),
    ):
        config = install(tmp_path, monkeypatch, body)
        if body == "pass":
            site = tmp_path / "site" / "sitecustomize.py"
            site.write_text(site.read_text() + before)
        results = srun(config)
        assert [code for code, _, _ in results] == [1, 1]
        assert "".join(errors for _, _, errors in results) == f"{line}\n"
