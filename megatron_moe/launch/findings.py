"""What is wrong with a machine, or will be: each with what to do about it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.run_rules import MEGATRON_CORE_VERSIONS
from megatron_moe.engine.libraries import Libraries, remedy
from megatron_moe.engine.machine import Machine

PYTHON_VERSIONS = ((3, 11), (3, 14))
"""The first version that is supported, and the first one that is not."""
TORCH_VERSION = (2, 13)
"""The first version that is supported."""
TORCHRUN_PORT = 29500
_SMALL_SHM_BYTES = 2**30
_FEW_FILES = 1024
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        stops: nothing can be trained, or not on the GPUs that are here.
    """

    what: str
    remedy: str
    stops: bool = False


def findings(machine: Machine, libraries: Libraries) -> list[Finding]:
    """Everything that is wrong, what stops training first."""
    found = [
        *_versions(machine),
        *_imports(libraries),
        *_gpus(machine, libraries),
        *_limits(machine),
        *_network(),
        *_locks(),
    ]
    return sorted(found, key=lambda finding: not finding.stops)


def _versions(machine: Machine) -> Iterator[Finding]:
    first, beyond = PYTHON_VERSIONS
    if not first <= numbers(machine.python)[:2] < beyond:
        yield Finding(
            f"Python {machine.python} is not among {version_range('python')}", "use another Python", True
        )
    for name, command in (
        ("torch", "pip install 'torch>=2.13'"),
        ("megatron-core", "pip install 'megatron-core>=0.16.1,<0.20'"),
    ):
        version = machine.packages.get(name)
        if version is None:
            yield Finding(f"{name} is not installed", command, True)
        elif not is_supported(name, version):
            yield Finding(f"{name} {version} is not among {version_range(name)}", command, True)


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version: `2.13.0+cpu` is (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def is_supported(name: str, version: str) -> bool:
    """Whether a version of torch or megatron-core is in its range."""
    if name == "torch":
        return numbers(version) >= TORCH_VERSION
    first, beyond = MEGATRON_CORE_VERSIONS
    return first <= numbers(version) < beyond


def version_range(name: str) -> str:
    """The supported versions in words."""
    if name == "torch":
        return "2.13 or newer"
    first, beyond = PYTHON_VERSIONS if name == "python" else MEGATRON_CORE_VERSIONS
    last = (beyond[0], beyond[1] - 1)
    return f"{'.'.join(map(str, first))} to {'.'.join(map(str, last))}"


def _imports(libraries: Libraries) -> Iterator[Finding]:
    for name, reason in libraries.broken.items():
        stops = name in ("torch", "megatron-core")
        if (other := libraries.blamed.get(name)) is not None:
            what = f"{name} cannot be imported, because {other} is installed and cannot: {reason}"
            yield Finding(what, remedy(other), stops)
        elif name not in libraries.blamed.values():
            advice = f"pip install --force-reinstall {name}" if stops else remedy(name)
            yield Finding(f"{name} is installed, but cannot be imported: {reason}", advice, stops)


def _gpus(machine: Machine, libraries: Libraries) -> Iterator[Finding]:
    if machine.gpu_complaint:
        yield Finding(
            f"nvidia-smi fails: {machine.gpu_complaint}",
            "restart the machine, or its driver",
            bool(machine.driver),
        )
    if machine.driver is None or "torch" not in machine.packages:
        return
    if machine.torch_cuda is None:
        yield Finding(
            f"NVIDIA's driver {machine.driver} is here, but torch was built without CUDA: ranks use the CPU",
            "install a torch with CUDA, as pytorch.org/get-started says for this machine",
            True,
        )
    elif libraries.gpu_problem:
        yield Finding(
            f"torch {machine.packages['torch']} for CUDA {machine.torch_cuda} cannot use the GPUs under "
            f"driver {machine.driver}: {libraries.gpu_problem}",
            "a newer driver, or a torch for an older CUDA",
            True,
        )


def _limits(machine: Machine) -> Iterator[Finding]:
    if machine.shm_bytes is not None and machine.shm_bytes < _SMALL_SHM_BYTES:
        yield Finding(
            f"/dev/shm has {machine.shm_bytes / 2**20:,.0f} MiB, and NCCL and torch exchange data there",
            "docker run --ipc=host, or --shm-size=8g",
        )
    if machine.open_files < _FEW_FILES:
        yield Finding(
            f"a process may open {machine.open_files} files, and each rank holds connections to all others",
            "ulimit -n 65536",
        )


def _network() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        yield Finding(
            f"this machine's name, {name}, does not resolve, and gloo looks for it under torchrun and srun",
            "put it into /etc/hosts, or set GLOO_SOCKET_IFNAME to a network interface",
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", TORCHRUN_PORT))
        except OSError:
            yield Finding(
                f"port {TORCHRUN_PORT}, which torchrun takes unless told another, is in use",
                "torchrun --master-port 29501",
            )


def _locks() -> Iterator[Finding]:
    """Run folders are made in the working directory unless `logging.root` says otherwise."""
    try:
        descriptor = os.open(".", os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            yield Finding(
                "the file system of the working directory has no file locks, which run folders need",
                "set logging.root to a folder elsewhere, or mount it with locks (Lustre: -o flock)",
            )
    finally:
        os.close(descriptor)
