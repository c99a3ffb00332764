"""What this machine has: packages, processors, GPUs, limits. Looked at from outside, without importing torch.

`doctor` prints it, checks before a start compare with it; whoever needs another machine makes one by hand.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine",
    "apex": "apex",
    "deep-ep": "deep_ep",
    "pyarrow": "pyarrow",
    "zstandard": "zstandard",
    "tokenizers": "tokenizers",
    "tiktoken": "tiktoken",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
"""Name of the distribution -> the module that it brings."""
BF16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512"}
"""A processor's flag -> its units for products in bf16."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver describes it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """Compute capability, (9, 0) for Hopper: what its units can do."""


@dataclass(frozen=True)
class Machine:
    """One machine, seen by one process."""

    python: str = "3.11.0"
    packages: dict[str, str] = field(default_factory=dict)
    """Installed packages of `PACKAGES` with their versions; "" where a package does not say its version."""
    torch_cuda: str | None = None
    """The CUDA version that torch was built for; None for a build without CUDA."""
    driver: str | None = None
    """Version of NVIDIA's driver, if it runs."""
    gpus: tuple[Gpu, ...] = ()
    """Those that CUDA_VISIBLE_DEVICES leaves to this process."""
    gpu_complaint: str = ""
    """What nvidia-smi says where it fails."""
    cores: int = 1
    """CPU cores that this process may use."""
    cpu_flags: frozenset[str] = frozenset()
    memory_bytes: int = 0
    shm_bytes: int | None = None
    """Size of /dev/shm; None where there is none."""
    open_files: int = 1024
    """Files that a process may have open at once; the launcher's ranks inherit it."""


def look() -> Machine:
    """The machine that this process runs on. Takes milliseconds, with a GPU a fraction of a second."""
    driver, gpus, complaint = _gpus()
    return Machine(
        python=platform.python_version(),
        packages=_packages(),
        torch_cuda=_torch_cuda(),
        driver=driver,
        gpus=visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")),
        gpu_complaint=complaint,
        cores=len(os.sched_getaffinity(0)),
        cpu_flags=_cpu_flags(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shm_bytes=_size_of(Path("/dev/shm")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _packages() -> dict[str, str]:
    return {name: version for name in PACKAGES if (version := package_version(name)) is not None}


def package_version(name: str) -> str | None:
    """Version of a package of `PACKAGES`; "" where it is there without saying one, None where it is not."""
    for distribution in (name, name.replace("-", "_")):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    top = PACKAGES[name].partition(".")[0]
    # A folder of that name somewhere on the path is no package: it has no loader.
    spec = importlib.util.find_spec(top) if name != "megatron-core" else None
    return "" if spec is not None and spec.loader is not None and spec.origin is not None else None


def _torch_cuda() -> str | None:
    """`cuda` in torch's version.py: reading it takes no second, importing torch does."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        source = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.AnnAssign | ast.Assign) and isinstance(statement.value, ast.Constant):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            if isinstance(target, ast.Name) and target.id == "cuda":
                return None if statement.value.value is None else str(statement.value.value)
    return None


def _gpus() -> tuple[str | None, tuple[Gpu, ...], str]:
    """The driver's version, its GPUs, and what it complains about: from nvidia-smi."""
    query = "--query-gpu=driver_version,name,memory.total,compute_cap"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError:
        return _loaded_driver(), (), ""
    except subprocess.TimeoutExpired:
        return _loaded_driver(), (), "nvidia-smi does not answer within 20 s"
    if done.returncode:
        return _loaded_driver(), (), " ".join((done.stdout + done.stderr).split())
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return (rows[0][0] if rows else _loaded_driver()), tuple(_gpu(*row[1:]) for row in rows), ""


def visible(gpus: tuple[Gpu, ...], variable: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES lists by their numbers, up to the first number that is none; all
    where it is not set or lists them in another way."""
    if variable is None:
        return gpus
    numbers = [entry.strip() for entry in variable.split(",")]
    if any(number.startswith(("GPU-", "MIG-")) for number in numbers):
        return gpus
    shown = []
    for number in numbers:
        if not number.isdecimal() or int(number) >= len(gpus):
            break
        shown.append(gpus[int(number)])
    return tuple(shown)


def _gpu(name: str, mebibytes: str, capability: str) -> Gpu:
    """A GPU from cells of nvidia-smi, which writes [N/A] for what it does not know."""
    major, _, minor = capability.partition(".")
    return Gpu(
        name,
        int(mebibytes) * 2**20 if mebibytes.isdecimal() else 0,
        (int(major) if major.isdecimal() else 0, int(minor) if minor.isdecimal() else 0),
    )


def _loaded_driver() -> str | None:
    """The version of the kernel's module, which is there in containers without nvidia-smi too."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return found[1] if found else "unknown"


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _size_of(folder: Path) -> int | None:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize
