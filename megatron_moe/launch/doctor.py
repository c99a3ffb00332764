"""`megatron-moe doctor`: what is installed, what this machine has, and what of it makes training fast."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from rich.console import Console
from rich.text import Text

from megatron_moe import __version__
from megatron_moe.engine.fast_paths import FastPath, fast_paths
from megatron_moe.engine.libraries import Libraries, load
from megatron_moe.engine.machine import BF16_FLAGS, Machine, look
from megatron_moe.launch import exit_codes
from megatron_moe.launch.findings import Finding, findings, version_range

_WIDTH = 80
_INDENT = 22
_A_GPU = "a GPU of compute capability 8.0 or higher, and the packages of the Dockerfile"
_EXTRAS = {
    "parquet": ("pyarrow",),
    "zstd": ("zstandard",),
    "huggingface": ("tokenizers",),
    "tiktoken": ("tiktoken",),
    "tensorboard": ("tensorboard",),
}
"""Our extra -> the packages that it installs."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that is printed."""

    machine: Machine
    libraries: Libraries
    findings: list[Finding]
    fast_paths: list[FastPath]

    @property
    def exit_code(self) -> int:
        stops = any(finding.stops for finding in self.findings)
        return exit_codes.FAILED if stops else exit_codes.DONE


def examine() -> Report:
    """Look at this machine."""
    machine = look()
    libraries = load(machine)
    return Report(machine, libraries, findings(machine, libraries), fast_paths(machine, libraries.broken))


def run(as_json: bool) -> int:
    """Print what was found; exit code 1 if nothing can be trained here, or not on the GPUs that are here."""
    report = examine()
    if as_json:
        sys.stdout.write(json.dumps(_json(report), indent=2, default=sorted) + "\n")
    else:
        console = Console(highlight=False, soft_wrap=True)
        for line in lines(report):
            console.print(line)
    return report.exit_code


def _json(report: Report) -> dict[str, object]:
    found = dataclasses.asdict(report)
    machine = found["machine"]
    machine["cpu_flags"] = sorted(set(machine["cpu_flags"]) & BF16_FLAGS.keys())
    return {"version": __version__, "host": socket.gethostname(), **found}


def lines(report: Report) -> Iterator[Text]:
    """The report, at most 80 columns wide: what is wrong first."""
    yield Text(f"{socket.gethostname()}: {_verdict(report)}", "bold")
    for finding in report.findings:
        yield from _row("wrong" if finding.stops else "mind", [finding.what, f"-> {finding.remedy}"], "red")
    yield Text("Versions", "bold")
    for name, text in _versions(report):
        yield from _row(name, [text])
    yield Text("Devices", "bold")
    for name, text in _devices(report.machine):
        yield from _row(name, [text])
    yield Text("Fast paths", "bold")
    yield from _fast_paths(report)
    yield Text("Extras", "bold")
    for name, text in _extras(report.machine):
        yield from _row(name, [text])


def _fast_paths(report: Report) -> Iterator[Text]:
    """What is on in one paragraph, then what is off; without a GPU one remedy stands for all."""
    on = [path.name for path in report.fast_paths if path.on]
    if on:
        yield from _row("on", [", ".join(on)], "green")
    has_gpu = bool(report.machine.gpus)
    off = [path for path in report.fast_paths if not path.on]
    for path, below in zip_longest(off, off[1:]):
        own_remedy = has_gpu and (below is None or below.remedy != path.remedy)
        yield from _row(path.name, [path.without, *([f"-> {path.remedy}"] if own_remedy else [])], "yellow")
    if off and not has_gpu:
        yield from _row("", [f"-> {_A_GPU}"])


def _verdict(report: Report) -> str:
    if report.exit_code:
        return "something is broken"
    if not report.machine.gpus:
        return "ready to train, on the CPU"
    return f"ready to train, on {len(report.machine.gpus)} x {report.machine.gpus[0].name}"


def _versions(report: Report) -> Iterator[tuple[str, str]]:
    machine = report.machine
    yield "megatron_moe", __version__
    yield "python", f"{machine.python} (supported: {version_range('python')})"
    for name in ("torch", "megatron-core"):
        yield name, f"{machine.packages.get(name, 'not installed')} (supported: {version_range(name)})"
    optional = {name: machine.packages.get(name) for name in ("transformer-engine", "apex", "deep-ep")}
    yield (
        "optional",
        ", ".join(
            f"{name} {'-' if version is None else version or 'installed'}"
            for name, version in optional.items()
        ),
    )
    parts = {"CUDA": machine.torch_cuda, "NCCL": report.libraries.nccl, "driver": machine.driver}
    yield "CUDA", ", ".join(f"{name} {version or '-'}" for name, version in parts.items())


def _devices(machine: Machine) -> Iterator[tuple[str, str]]:
    units = [name for flag, name in BF16_FLAGS.items() if flag in machine.cpu_flags]
    bf16 = f"bf16 units: {', '.join(units)}" if units else "no bf16 units"
    yield "CPU", f"{machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB of memory, {bf16}"
    if not machine.gpus:
        yield "GPU", "none"
    for gpu in dict.fromkeys(machine.gpus):
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB, " if gpu.memory_bytes else ""
        capability = ".".join(map(str, gpu.capability))
        yield "GPU", f"{machine.gpus.count(gpu)} x {gpu.name}, {memory}compute capability {capability}"


def _extras(machine: Machine) -> Iterator[tuple[str, str]]:
    missing = [
        name for name, packages in _EXTRAS.items() if any(part not in machine.packages for part in packages)
    ]
    there = [name for name in _EXTRAS if name not in missing]
    if there:
        yield "on", ", ".join(there)
    if missing:
        named = ",".join(missing) if there else "all"
        yield "off", f"{', '.join(missing)} -> pip install 'megatron-moe[{named}]'"


def _row(name: str, paragraphs: Sequence[str], style: str = "") -> Iterator[Text]:
    """A name, and beside it paragraphs that are wrapped."""
    label = f"  {name}" if name else ""
    for paragraph in paragraphs:
        # A command is not broken inside: it is copied.
        wrapped = textwrap.wrap(paragraph, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
        for line in wrapped:
            text = Text(f"{label:<{_INDENT}}{line}")
            text.stylize(style, 0, len(label))
            yield text
            label = ""
