"""Which rank a process is, from what torchrun and srun put into the environment."""

from __future__ import annotations

import pytest

from megatron_moe.config.errors import InputError
from megatron_moe.launch.identity import from_environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29501",
}
# What srun sets in the second task of the second node, two nodes with two tasks each.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "n[1-2]",
}


def test_alone():
    assert from_environment({"PATH": "/bin"}) is None


def test_torchrun():
    identity = from_environment(TORCHRUN)
    assert identity is not None
    assert identity.environment() == TORCHRUN


def test_srun_with_the_masters_address():
    identity = from_environment(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29600"})
    assert identity is not None
    assert (identity.rank, identity.world_size) == (3, 4)
    assert (identity.local_rank, identity.local_world_size) == (1, 2)
    assert (identity.master_addr, identity.master_port) == ("10.0.0.1", 29600)


def test_srun_without_it_asks_scontrol_and_all_tasks_agree(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    third = from_environment(SRUN)
    first = from_environment(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert third is not None and first is not None
    assert third.master_addr == first.master_addr == "n1"
    assert third.master_port == first.master_port


def test_srun_without_scontrol_says_what_to_set(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="set MASTER_ADDR"):
        from_environment(SRUN)


def test_a_batch_script_and_a_step_of_one_task_are_alone():
    """Slurm gives both a SLURM_PROCID; in the batch script SLURM_NTASKS is the whole job's."""
    batch = {name: text for name, text in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert from_environment(batch) is None
    assert from_environment(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (TORCHRUN | {"RANK": "4"}, "WORLD_SIZE=4"),
        (TORCHRUN | {"RANK": "two"}, "RANK='two'"),
        ({name: text for name, text in TORCHRUN.items() if name != "MASTER_PORT"}, "not MASTER_PORT"),
        (SRUN | {"MASTER_ADDR": "n1", "SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE=two"),
    ],
)
def test_contradictions_name_the_variable(environ, named):
    with pytest.raises(InputError, match=named):
        from_environment(environ)
