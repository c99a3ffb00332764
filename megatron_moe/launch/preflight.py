"""Whether this machine has what an experiment needs: packages, GPUs, their compute capability.

Looked at where ranks are about to start, and without importing torch. `validate` and `plan` do not ask: an
experiment is right also where it cannot run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator

from megatron_moe.config.device_needs import Need, Package, needs_of
from megatron_moe.config.errors import InputError
from megatron_moe.config.keys import leaves
from megatron_moe.config.loading import Loaded
from megatron_moe.config.origin import Problem
from megatron_moe.engine.machine import Machine, look


def check(loaded: Loaded, machine: Machine | None = None) -> None:
    """Raise InputError with one line for everything that this machine lacks.

    Args:
        machine: what to hold the experiment against. None: this machine, if the experiment asks for anything.
    """
    needs = list(needs_of(loaded.experiment))
    if not needs:
        return
    machine = machine or look()
    problems = [problem for need in needs for problem in (*_package(need), *_gpu(need, machine))]
    if problems:
        raise InputError(*_lines(loaded, problems))


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
