"""Whether this machine has what an experiment needs: packages, GPUs, their compute capability.

Looked at where ranks are about to start, and without importing torch. `validate` and `plan` do not ask: an
experiment is right also where it cannot run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator

from megatron_moe.config.device_needs import Need, Package, needs_of
from megatron_moe.config.errors import InputError
from megatron_moe.config.keys import leaves
from megatron_moe.config.loading import Loaded
from megatron_moe.config.origin import Problem
from megatron_moe.config.schema import Experiment
from megatron_moe.engine.machine import Machine, look
from megatron_moe.launch import identity
from megatron_moe.plan import plan
from megatron_moe.plan.costs.scores import score_bytes


def check(loaded: Loaded, machine: Machine | None = None) -> None:
    """Raise InputError with one line for everything that this machine lacks.

    Args:
        machine: what to hold the experiment against. None: this machine, if the experiment asks for anything.
    """
    needs = list(needs_of(loaded.experiment))
    drops = loaded.experiment.model.attention_dropout > 0
    if not needs and not drops:
        return
    machine = machine or look()
    problems = [problem for need in needs for problem in (*_package(need), *_gpu(need, machine))]
    if drops:
        problems += _scores(loaded.experiment, machine)
    if problems:
        raise InputError(*_lines(loaded, problems))


def _scores(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """On a host dropout makes attention keep its scores, s x s for each head."""
    # `profile` comes by here too, to replace one that is about something else.
    its_plan = plan.make(experiment, profiled=False)
    needed = score_bytes(experiment, its_plan)
    if identity.from_environment(os.environ) is not None:  # one rank of those here is sure to be ours
        needed //= its_plan.layout.world_size
    if (machine.gpus and machine.torch_cuda is not None) or needed <= machine.memory_bytes:
        return
    keys = ("model.attention_dropout", "training.seq_length", "training.micro_batch_size")
    text = (
        f"needs the scores of all pairs of {keys[1]} positions without a GPU, which for {keys[2]} take at "
        f"least {needed / 2**30:,.0f} GiB, and this machine has {machine.memory_bytes / 2**30:,.0f} GiB"
    )
    again = "" if experiment.recompute.granularity == "full" else ", or recompute.granularity to full"
    yield Problem(keys, text, f"set it to 0{again}, or make the other two smaller")


def notes(loaded: Loaded) -> list[str]:
    """What `validate` says of packages that are missing here: one line each; nothing is wrong with the
    file."""
    return _lines(loaded, [problem for need in needs_of(loaded.experiment) for problem in _package(need)])


def _lines(loaded: Loaded, problems: list[Problem]) -> list[str]:
    values = dict(leaves(loaded.experiment))
    return [problem.render(values, loaded.provenance) for problem in problems]


def _package(need: Need) -> Iterator[Problem]:
    package = need.package
    if package is None:
        return
    remedy = f"{package.source}, or {need.otherwise}"
    wanted = ".".join(map(str, package.version))
    if importlib.util.find_spec(package.module) is None:
        since = f" {wanted} or newer" if package.version else ""
        yield Problem(
            (need.key,), f"needs the package {package.module}{since}, which is not installed here", remedy
        )
    elif (found := _version(package)) is not None and _numbers(found) < package.version:
        text = f"needs {package.module} {wanted} or newer, and {found} is installed here"
        yield Problem((need.key,), text, remedy)


def _version(package: Package) -> str | None:
    """The installed version; None where the package does not say it."""
    try:
        return importlib.metadata.version(package.module)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _gpu(need: Need, machine: Machine) -> Iterator[Problem]:
    remedy = f"start it on a machine with {_wanted(need)}, or {need.otherwise}"
    if not machine.gpus:
        yield Problem((need.key,), f"needs {_wanted(need)}, and there is none here", remedy)
    elif machine.torch_cuda is None:
        text = "needs a GPU, and the torch that is installed here was built without CUDA"
        yield Problem((need.key,), text, f"install a torch with CUDA, or {need.otherwise}")
    elif need.capability is not None:
        weakest = min(machine.gpus, key=lambda gpu: gpu.capability)
        if weakest.capability < need.capability:
            have = ".".join(map(str, weakest.capability))
            text = f"needs {_wanted(need)}, and the {weakest.name} here has {have}"
            yield Problem((need.key,), text, remedy)


def _wanted(need: Need) -> str:
    if need.capability is None:
        return "a GPU"
    return f"a GPU of compute capability {'.'.join(map(str, need.capability))} or higher"
