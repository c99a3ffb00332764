"""Measure training and start-up on this machine, and print the tables of docs/benchmarks.md.

Three loops train the same tiny model on the same batches in turns, in one process and in Expert Data Parallel
over two ranks: Megatron-Core's own model in a bare loop, ours in the same bare loop, ours as `train` runs it.
Ratios are taken between neighbours in time, so that a change of the machine's speed does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmark_startup import answer_s, first_step_s

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.loading import load
from megatron_moe.launch.local_ranks import threads_each

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ONE_PROCESS = [f"parallel.{group}_model_parallel_size=1" for group in ("tensor", "pipeline", "expert")]
LAYOUTS = {"one process": (1, ONE_PROCESS), "EDP, two ranks": (2, [])}
MODEL_ONLY = [  # Nothing but steps: no text, no evaluation, no checkpoint before the end.
    "data.kind=mock",
    "data.prepare=null",
    "model.vocab_size=1024",
    "training.train_iters=1000000",
    "optimizer.lr_decay_iters=300",
    "training.eval_interval=null",
    "checkpoint.save_interval=null",
]
SPEED_COLUMNS = ("layout", "measured", "by the clock", "by processor time of a rank")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/benchmark_training.py --repetitions 60 --steps 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="?", type=Path, default=QUICKSTART, help="default: configs/quickstart.yaml"
    )
    parser.add_argument("--repetitions", type=int, default=60, help="of each measurement (default: 60)")
    parser.add_argument("--steps", type=int, default=2, help="training steps a repetition (default: 2)")
    parser.add_argument("--only", choices=("training", "startup"), help="one of the two parts")
    args = parser.parse_args(argv)

    print(f"{_versions()}\n", flush=True)
    if args.only != "startup":
        rows = []
        for layout in LAYOUTS:
            rows += _speed_rows(args.config, layout, args.repetitions, args.steps)
        print(_table(SPEED_COLUMNS, rows), "\n", flush=True)
    if args.only != "training":
        print(_table(("wait", "seconds"), _startup_rows(args.config, args.repetitions)))
    return 0


def _speed_rows(config: Path, layout: str, repetitions: int, steps: int) -> list[list[str]]:
    measured = train_in_turns(config, layout, repetitions, steps)
    threads = measured["threads"]
    heading = f"{layout}, {threads} thread{'s' * (threads > 1)} each"
    by_clock = _figures(measured["tokens"], measured["seconds"])
    by_processor = _figures(measured["tokens"], measured["processor_seconds"])
    return [[heading, name, by_clock[name], by_processor[name]] for name in by_clock]


def _figures(tokens: int, seconds: dict[str, list[float]]) -> dict[str, str]:
    """Name -> median and range over the repetitions, each of which trained on `tokens` tokens."""

    def ratios(over: str, under: str) -> list[float]:
        return [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]

    return {
        "plain, tokens/s": _spread([tokens / s for s in seconds["plain"]], "{:,.0f}"),
        "ours, tokens/s": _spread([tokens / s for s in seconds["ours"]], "{:,.0f}"),
        "speed of ours over plain": _spread(ratios("plain", "ours"), "{:.2f}"),
        "speed of our model over plain, both in the bare loop": _spread(ratios("plain", "bare"), "{:.2f}"),
        "overhead of our loop over the bare one": _spread(
            [100 * (ratio - 1) for ratio in ratios("ours", "bare")], "{:.1f} %"
        ),
    }


def train_in_turns(config: Path, layout: str, repetitions: int, steps: int) -> dict[str, Any]:
    """What tools/benchmark_speed.py measures on rank 0 of a layout."""
    ranks, overrides = LAYOUTS[layout]
    with tempfile.TemporaryDirectory(prefix="megatron-moe-benchmark-") as folder:
        resolved, result = Path(folder, "resolved.yaml"), Path(folder, "result.json")
        resolved.write_text(to_yaml(load(config, [*MODEL_ONLY, *overrides]).experiment))
        program = [str(Path(__file__).with_name("benchmark_speed.py")), str(resolved), str(result)]
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        environment = {"OMP_NUM_THREADS": str(threads_each(ranks)), "PYTHONWARNINGS": "ignore"}
        subprocess.run(
            [*torchrun, *program, str(repetitions), str(steps)],
            check=True,
            env={"GLOO_SOCKET_IFNAME": "lo"} | os.environ | environment,
            stdout=subprocess.DEVNULL,
        )
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def _startup_rows(config: Path, repetitions: int) -> list[list[str]]:
    answers: dict[str, Callable[[], float]] = {
        "`--help`": lambda: answer_s("--help"),
        "`validate`": lambda: answer_s("validate", str(config)),
        "`plan`": lambda: answer_s("plan", str(config)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    for _ in range(repetitions):
        for name, measure in answers.items():
            seconds[name].append(measure())
    # The first start of a machine's day reads libraries from the disk; these are later ones.
    cold, warm = zip(*(first_step_s(config) for _ in range(max(1, repetitions // 12))), strict=True)
    seconds |= {
        "`train` to the first step, data prepared": list(warm),
        "`train` to the first step, data not prepared": list(cold),
    }
    return [[name, _spread(values, "{:.2f}")] for name, values in seconds.items()]


def _spread(values: Sequence[float], form: str) -> str:
    """Median (min to max)."""
    return f"{form.format(median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def _versions() -> str:
    from importlib.metadata import version

    names = ("torch", "megatron-core")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


if __name__ == "__main__":
    sys.exit(main())
