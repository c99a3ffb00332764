"""Measure what TensorBoard and Weights & Biases cost a step, and print the table of docs/benchmarks.md.

One process trains the quickstart's model on random tokens and takes turns between its callbacks:
metrics.jsonl alone, and with each sink beside it. Ratios are taken between neighbours in time. Weights &
Biases runs offline: what it does for a server, its own processes do.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmark_training import MODEL_ONLY, ONE_PROCESS, QUICKSTART, _spread, _table, _versions

from megatron_moe.config.loading import load
from megatron_moe.config.schema import Experiment
from megatron_moe.plan import plan
from megatron_moe.training.build import start
from megatron_moe.training.callback import Callback
from megatron_moe.training.callbacks.metrics_file import MetricsFile
from megatron_moe.training.callbacks.sink import Feed
from megatron_moe.training.run import LOG, sinks
from megatron_moe.training.trainer import Trainer

ALONE = "metrics.jsonl alone"
SINKS = {
    ALONE: [],
    "with TensorBoard": ["logging.tensorboard=true"],
    "with Weights & Biases": ["logging.wandb.project=benchmark", "logging.wandb.mode=offline"],
    "with both": [
        "logging.tensorboard=true",
        "logging.wandb.project=benchmark",
        "logging.wandb.mode=offline",
    ],
}
COLUMNS = (
    "run",
    "a step, ms",
    "more than alone, by the clock",
    "by processor time",
    "handing a step over, µs",
    "its threads' processor time a step, ms",
)


@dataclass
class Contender:
    """The callbacks of one way to run, and what was measured of it: a number a repetition."""

    callbacks: list[Callback]
    step_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    handing_over_s: list[float] = field(default_factory=list)
    threads_s: float = 0.0
    """Processor time of its sinks' threads a step, over all: at most that long they keep the training from
    Python."""

    def forget(self) -> None:
        """Begin to measure."""
        for measured in (self.step_s, self.processor_s, self.handing_over_s):
            measured.clear()
        self.threads_s = -_threads_s(self)

    @property
    def feeds(self) -> list[Feed]:
        return [callback for callback in self.callbacks if isinstance(callback, Feed)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/benchmark_sinks.py --repetitions 40 --steps 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="?", type=Path, default=QUICKSTART, help="default: configs/quickstart.yaml"
    )
    parser.add_argument("--repetitions", type=int, default=40, help="turns of each (default: 40)")
    parser.add_argument("--steps", type=int, default=3, help="training steps a turn (default: 3)")
    args = parser.parse_args(argv)
    os.environ.pop("WANDB_MODE", None)
    print(f"{_versions()}\n", flush=True)
    print(_table(COLUMNS, rows(measure(args.config, args.repetitions, args.steps))))
    return 0


def measure(config: Path, repetitions: int, steps: int) -> dict[str, Contender]:
    """Take turns, `steps` steps each, in rotating order."""
    experiments = {
        name: load(config, [*MODEL_ONLY, *ONE_PROCESS, "logging.detail_interval=10", *overrides]).experiment
        for name, overrides in SINKS.items()
    }
    os.environ |= _alone()
    with tempfile.TemporaryDirectory(prefix="megatron-moe-benchmark-") as folder:
        trainer = start(experiments[ALONE], plan.make(experiments[ALONE]), Path(folder))
        contenders = {
            name: _contender(trainer, experiment, Path(folder, str(number)))
            for number, (name, experiment) in enumerate(experiments.items())
        }
        batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
        names = list(contenders)
        # The first round is not measured: sinks are still starting.
        for repetition in range(-1, repetitions):
            at = repetition % len(names)
            for name in names[at:] + names[:at]:
                contender = contenders[name]
                started, processor, handing_over = time.perf_counter(), time.process_time(), 0.0
                for _ in range(steps):
                    record = trainer.step(batches)
                    for callback in contender.callbacks:
                        before = time.perf_counter()
                        callback.on_step(trainer, record)
                        handing_over += (time.perf_counter() - before) * isinstance(callback, Feed)
                contender.step_s.append((time.perf_counter() - started) / steps)
                contender.processor_s.append((time.process_time() - processor) / steps)
                contender.handing_over_s.append(handing_over / steps)
            if repetition < 0:
                _wait_for_wandb(Path(folder))
                for contender in contenders.values():
                    contender.forget()
        for contender in contenders.values():
            contender.threads_s = (contender.threads_s + _threads_s(contender)) / (steps * repetitions)
            for callback in contender.callbacks:
                callback.on_end(trainer)
            assert not any(feed.said for feed in contender.feeds), "a sink did not get through"
    return contenders


def _contender(trainer: Trainer, experiment: Experiment, folder: Path) -> Contender:
    folder.mkdir()
    log = folder / LOG
    feeds = [Feed(sink, log) for sink in sinks(folder, experiment)]
    contender = Contender([MetricsFile(folder / "metrics.jsonl", log), *feeds])
    for callback in contender.callbacks:
        callback.on_start(trainer)
    return contender


def _threads_s(contender: Contender) -> float:
    """Processor time of its sinks' threads so far."""
    idents = [feed.thread.ident for feed in contender.feeds]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in idents if ident is not None)


def _wait_for_wandb(folder: Path) -> None:
    """Until each run of wandb has taken its first step."""
    deadline = time.monotonic() + 60
    states = list(folder.glob("*/wandb/run.json"))
    while not all(json.loads(state.read_text())["iteration"] for state in states):
        assert time.monotonic() < deadline, "wandb did not start"
        time.sleep(0.1)


def rows(contenders: dict[str, Contender]) -> list[list[str]]:
    """The table: median (smallest to largest) over the repetitions."""

    def more(seconds: list[float], alone: list[float]) -> str:
        ratios = [100 * (step / base - 1) for step, base in zip(seconds, alone, strict=True)]
        return _spread(ratios, "{:.1f} %")

    alone, table = contenders[ALONE], []
    for name, measured in contenders.items():
        cells = [_spread([1e3 * seconds for seconds in measured.step_s], "{:.0f}")]
        if name == ALONE:
            cells += [""] * (len(COLUMNS) - 2)
        else:
            cells.append(more(measured.step_s, alone.step_s))
            cells.append(more(measured.processor_s, alone.processor_s))
            cells.append(_spread([1e6 * seconds for seconds in measured.handing_over_s], "{:.0f}"))
            share = 100 * measured.threads_s / median(alone.step_s)
            cells.append(f"{1e3 * measured.threads_s:.2f} ({share:.2f} % of a step)")
        table.append([name, *cells])
    return table


def _alone() -> dict[str, str]:
    """The environment of the only rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


if __name__ == "__main__":
    sys.exit(main())
