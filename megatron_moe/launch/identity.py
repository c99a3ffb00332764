"""Which rank this process is, where torchrun or srun started it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_moe.config.errors import InputError


@dataclass(frozen=True)
class Identity:
    """One rank among others, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed's `env://` reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def from_environment(environ: Mapping[str, str]) -> Identity | None:
    """The rank that torchrun or a Slurm job step made this process; None where it was started alone.

    Raises InputError where the variables contradict each other or the meeting point is unknown.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    if "SLURM_PROCID" in environ and _in_job_step(environ) and _slurm_tasks(environ) > 1:
        return _from_slurm(environ)
    return None


def _from_torchrun(environ: Mapping[str, str]) -> Identity:
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise InputError(
            f"RANK={rank} is not below WORLD_SIZE={world_size}: unset both to start the ranks here"
        )
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise InputError(
                    f"RANK and WORLD_SIZE are set, but not {name}: start with torchrun, or unset them"
                )
    return Identity(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", rank),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", world_size),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT", 29500),
    )


def _in_job_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has a SLURM_PROCID too, but is no rank."""
    return any(name in environ for name in ("SLURM_STEP_ID", "SLURM_STEPID"))


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the job step; SLURM_NTASKS may still be the whole job's."""
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def _from_slurm(environ: Mapping[str, str]) -> Identity:
    world_size = _slurm_tasks(environ)
    return Identity(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on_node(environ, world_size),
        master_addr=environ.get("MASTER_ADDR") or _first_host(environ),
        master_port=_number(environ, "MASTER_PORT", _port_of_step(environ)),
    )


def _tasks_on_node(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks of this step on this node, from a list such as `2(x3),1`: three nodes with two, one with one."""
    tasks: list[int] = []
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise InputError(f"SLURM_STEP_TASKS_PER_NODE={text} is not a list of tasks such as 2(x3),1")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks[min(_number(environ, "SLURM_NODEID", 0), len(tasks) - 1)]


def _first_host(environ: Mapping[str, str]) -> str:
    """The host of rank 0."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if re.fullmatch(r"[A-Za-z0-9._-]+", nodes):
        return nodes
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise InputError(
            f"scontrol does not name the first host of SLURM_JOB_NODELIST={nodes}: "
            "set MASTER_ADDR to the host of rank 0, e.g. MASTER_ADDR=node1"
        ) from error


def _port_of_step(environ: Mapping[str, str]) -> int:
    """A port that all ranks of a step agree on, and steps that share a node most likely do not."""
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    return 20000 + (job * 131 + step) % 10000


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise InputError(
            f"{name}={text!r} in the environment is not a number: start with torchrun or srun, or unset it"
        )
    return int(text)
