"""How fast import and export are, and in how much memory, beside the disk itself and transformers.

Makes a random Mixtral of about the given size in a folder, which must have room for four copies, and converts
it there and back, each in a process of its own, the files out of the page cache before each. `transformers`
loads the same folder and saves it. The disk: the same bytes read, and written and synced.

    python tools/benchmark_conversion.py --folder /scratch --gigabytes 4
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.convert.weights import Weight

_READ = 1 << 24
_LAYER_BYTES = 587e6
"""Of the model below, in bf16."""


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    what: str
    seconds: float
    processor_s: float
    peak_bytes: int


class Random:
    """Weights of these shapes in bf16."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def inventory(self) -> dict[str, Weight]:
        import torch

        return {name: Weight(shape, torch.bfloat16) for name, shape in self._shapes.items()}

    def read(self, name: str) -> object:
        import torch

        return torch.randn(self._shapes[name]).bfloat16()


def make(folder: Path, layers: int) -> None:
    """Write a random model into `folder`."""
    from megatron_moe.config.defaults import fill
    from megatron_moe.config.schema import Experiment
    from megatron_moe.convert.exporting import Theirs
    from megatron_moe.convert.families import FAMILIES
    from megatron_moe.convert.safetensors_writer import write_safetensors
    from megatron_moe.model.skeleton import skeleton

    experiment = fill(
        Experiment.model_validate(
            {
                "name": "random",
                "model": {
                    "num_layers": layers,
                    "hidden_size": 2048,
                    "num_attention_heads": 16,
                    "num_query_groups": 4,
                    "ffn_hidden_size": 5632,
                    "vocab_size": 32000,
                },
                "moe": {"num_moe_experts": 8},
                "data": {"kind": "mock"},
                "training": {"train_iters": 1, "global_batch_size": 1, "seq_length": 2048},
            }
        )
    )
    family = FAMILIES["mixtral"]
    weights = Random(skeleton(experiment).shapes())
    folder.mkdir()
    write_safetensors(folder, Theirs(family, experiment, weights), 2_000_000_000, 1)  # type: ignore[arg-type]
    config = {**family.config(experiment), "architectures": list(family.architectures), "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def read_all(folder: Path) -> None:
    """Every byte of a folder's files."""
    buffer = bytearray(_READ)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write_as_much(folder: Path, out: Path) -> None:
    """As many bytes as a folder's files have, synced."""
    content = os.urandom(_READ)
    with out.open("wb", buffering=0) as file:
        for _ in range(size_of(folder) // _READ):
            file.write(content)
        os.fsync(file.fileno())


def with_transformers(folder: Path, out: Path) -> None:
    """Load and save."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(out)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def command(*arguments: object) -> None:
    """A command of megatron-moe."""
    from megatron_moe.cli import main

    if main([str(argument) for argument in arguments]):
        raise SystemExit(1)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(what: str, function: object, *arguments: object) -> Measured:
    """Run a function in a process of its own."""
    assert callable(function)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            function(*arguments)
        except BaseException as error:
            print(f"{what}: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{what} failed")
    processor_s = usage.ru_utime + usage.ru_stime
    return Measured(what, time.monotonic() - began, processor_s, usage.ru_maxrss * 1024)


def forget(*folders: Path) -> None:
    """Take files out of the page cache."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(scratch: Path, gigabytes: float, peers: bool) -> None:
    source, ours, back, theirs = (scratch / name for name in ("source", "ours", "back", "theirs"))
    measured("making it", make, source, max(1, round((gigabytes * 1e9 - 0.26e9) / _LAYER_BYTES)))
    size = size_of(source)
    lines = []
    for what, function, arguments in (
        ("the disk: reading it", read_all, (source,)),
        ("the disk: writing as much", write_as_much, (source, scratch / "raw")),
        ("megatron-moe import", command, ("import", source, ours)),
        ("megatron-moe export", command, ("export", ours, back)),
        ("transformers: load and save", with_transformers, (source, theirs)),
    ):
        if function is not with_transformers or peers:
            forget(source, ours)
            lines.append(measured(what, function, *arguments))
            (scratch / "raw").unlink(missing_ok=True)
    print(f"A random Mixtral of {size / 1e9:.2f} GB in bf16, largest tensor 0.13 GB\n")
    print("| | s | GB/s | processor, s | peak memory, GB |\n|---|---|---|---|---|")
    for line in lines:
        rate = size / 1e9 / line.seconds
        memory = line.peak_bytes / 1e9
        figures = f"{line.seconds:.1f} | {rate:.2f} | {line.processor_s:.1f} | {memory:.2f}"
        print(f"| {line.what} | {figures} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the model (default: %(default)s)")
    parser.add_argument("--without-peers", action="store_true", help="leave transformers out")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="conversion-", dir=args.folder))
    try:
        run(scratch, args.gigabytes, not args.without_peers)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
