"""`scripts/slurm.sbatch` over stand-ins of Slurm's programs: what it starts, and when it comes back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm.sbatch"
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > srun.args
env > srun.env
trap 'exit 75' TERM
{body}
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> scontrol.calls
if [[ $1 == show ]]; then printf 'node3\\nnode4\\n'; fi
"""
SCANCEL = """#!/usr/bin/env bash
echo "$*" >> scancel.calls
kill -TERM "$(cat srun.pid)"
"""


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, srun: str) -> dict[str, str]:
    """The environment of a batch script whose srun does `srun`, in `folder`."""
    tools = folder / "tools"
    tools.mkdir()
    programs = {"srun": SRUN.replace("{body}", srun), "scontrol": SCONTROL, "scancel": SCANCEL}
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (folder / "small.yaml").touch()
    monkeypatch.chdir(folder)
    ours = ("SLURM_", "MASTER_", "VENV", "CONFIG", "OMP_")
    for name in [name for name in os.environ if name.startswith(ours)]:
        monkeypatch.delenv(name)
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[3-4]",
        "CONFIG": "small.yaml",
    }


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def requeued(folder: Path) -> bool:
    calls = folder / "scontrol.calls"
    return calls.exists() and "requeue 7" in calls.read_text().splitlines()


@pytest.mark.parametrize(("ended", "again"), [(0, False), (1, False), (2, False), (75, True)])
def test_the_exit_code_decides(tmp_path, monkeypatch, ended: int, again: bool) -> None:
    job = start(prepare(tmp_path, monkeypatch, f"exit {ended}"))
    output, _ = job.communicate(timeout=30)
    assert job.returncode == ended
    assert requeued(tmp_path) is again
    assert ("job 7 is queued again" in output) is again


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_lets_the_ranks_save(tmp_path, monkeypatch, number: int, again: bool) -> None:
    """USR1 comes before the time is over. Who sends TERM, as scancel does, wants the job to stay away."""
    job = start(prepare(tmp_path, monkeypatch, "echo $$ > srun.pid; while :; do sleep 0.05; done"))
    deadline = time.monotonic() + 30
    while not (tmp_path / "srun.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(number)
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert (tmp_path / "scancel.calls").read_text().split() == ["--signal=TERM", "7.0"]
    assert requeued(tmp_path) is again


def test_the_job_does_not_come_back_for_ever(tmp_path, monkeypatch) -> None:
    environment = prepare(tmp_path, monkeypatch, "exit 75") | {
        "SLURM_RESTART_COUNT": "3",
        "MAX_RESTARTS": "3",
    }
    job = start(environment)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 75 and not requeued(tmp_path)
    assert errors.count("\n") == 1 and "MAX_RESTARTS" in errors


def test_one_task_a_rank_meets_at_the_first_node(tmp_path, monkeypatch) -> None:
    environment = prepare(tmp_path, monkeypatch, "exit 0") | {"SLURM_CPUS_PER_TASK": "6"}
    start(environment, "name=two words", "training.train_iters=20").communicate(timeout=30)
    arguments = (tmp_path / "srun.args").read_text().splitlines()
    assert arguments[-5:] == [
        "megatron_moe",
        "train",
        "small.yaml",
        "name=two words",
        "training.train_iters=20",
    ]
    assert arguments[-7:-5] == ["python", "-m"]
    seen = (tmp_path / "srun.env").read_text().splitlines()
    assert {"MASTER_ADDR=node3", "SRUN_CPUS_PER_TASK=6", "OMP_NUM_THREADS=6"} <= set(seen)


def test_a_container_takes_the_place_of_the_environment(tmp_path, monkeypatch) -> None:
    environment = prepare(tmp_path, monkeypatch, "exit 0") | {"CONTAINER": "megatron-moe.sqsh"}
    start(environment | {"CONFIG": "/inside/small.yaml"}).communicate(timeout=30)
    arguments = (tmp_path / "srun.args").read_text().splitlines()
    assert "--container-image=megatron-moe.sqsh" in arguments
    assert f"--container-mounts={tmp_path}:{tmp_path}" in arguments
    assert arguments[-1] == "/inside/small.yaml"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"CONFIG": ""}, "CONFIG is not filled in"),
        ({"CONFIG": "none.yaml"}, "CONFIG: there is no file none.yaml"),
        ({"VENV": "nowhere"}, "VENV: there is no nowhere/bin/python"),
        ({"MAX_RESTARTS": "many"}, "MAX_RESTARTS must be a whole number, not 'many'"),
        ({"SLURM_JOB_ID": ""}, "submit it: sbatch slurm.sbatch"),
    ],
)
def test_what_is_not_filled_in_is_said(tmp_path, monkeypatch, change: dict[str, str], words: str) -> None:
    job = start(prepare(tmp_path, monkeypatch, "exit 0") | change)
    output, errors = job.communicate(timeout=30)
    assert (job.returncode, output) == (2, "")
    assert errors.startswith(f"slurm.sbatch: {words}") and errors.count("\n") == 1
    assert not (tmp_path / "srun.args").exists()


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_bash_and_end_at_their_first_error(name: str) -> None:
    path = ROOT / "scripts" / name
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text


def test_slurm_reads_the_settings_it_is_meant_to() -> None:
    """Slurm stops reading #SBATCH lines at the first command."""
    text = SCRIPT.read_text()
    head = text[: text.index("\nset -euo pipefail")]
    settings = re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)
    assert settings == re.findall(r"^#SBATCH --([\w-]+)", head, re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "time", "signal", "requeue", "open-mode"} <= set(settings)
