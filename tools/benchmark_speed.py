"""One rank of the benchmark's training part: three loops over the same batches, in turns.

plain   Megatron-Core's own model in the bare loop (benchmark_megatron_core.py)
bare    our model in the same bare loop, its router counting nothing
ours    our model in our loop, with the callbacks that `train` installs

    torchrun --standalone --nproc-per-node 2 tools/benchmark_speed.py resolved.yaml out.json REPETITIONS STEPS
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_moe.config.loading import load
from megatron_moe.engine import groups
from megatron_moe.model.moe.statistics import RoutingStatistics
from megatron_moe.plan import plan
from megatron_moe.training.build import start
from megatron_moe.training.forward import Batch
from megatron_moe.training.run import standard_callbacks
from megatron_moe.training.trainer import Trainer

CHECKED_STEPS = 3
TOLERANCE = 1e-5


def measure(config: Path, repetitions: int, steps: int) -> dict[str, object]:
    """Seconds of each repetition, and seconds of processor time that this rank took, a list a contender; a
    repetition runs `steps` steps of each, in rotating order."""
    experiment = load(config, [], world_size=None).experiment
    trainer = start(experiment, plan.make(experiment), config.parent)
    contenders, losses = _contenders(trainer, repetitions * steps)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repetitions):
        names = list(contenders)
        for name in names[repetition % 3 :] + names[: repetition % 3]:
            dist.barrier()
            started, processor_started = time.perf_counter(), time.process_time()
            for _ in range(steps):
                contenders[name]()
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - processor_started)
    tokens = steps * experiment.training.global_batch_size * experiment.training.seq_length
    return {
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "losses": losses,
        "seconds": seconds,
        "processor_seconds": processor,
    }


def _contenders(
    trainer: Trainer, steps: int
) -> tuple[dict[str, Callable[[], object]], dict[str, list[float]]]:
    """A function a contender that does one of `steps` steps, warm; and the losses of the first steps, which
    agree."""
    # Not before `start` has installed the host's stand-ins: it imports Megatron-Core.
    from benchmark_megatron_core import Loop, plain_loop

    plain = plain_loop(trainer)
    trainer.callbacks = standard_callbacks(trainer.run_folder, trainer.experiment)
    for callback in trainer.callbacks:
        callback.on_start(trainer)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    drawn = _draw(trainer, CHECKED_STEPS + steps)
    for_plain, for_bare = iter(drawn), iter(drawn[CHECKED_STEPS - 1 :])

    def ours() -> float:
        record = trainer.step(batches)
        for callback in trainer.callbacks:
            callback.on_step(trainer, record)
        return float(record["loss"])

    def plain_loss() -> float:
        sums = torch.stack(plain.step(next(for_plain))).sum(0)
        return float(sums[0] / sums[1])

    losses: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(CHECKED_STEPS):
        losses["ours"].append(ours())
        losses["plain"].append(plain_loss())
    for mine, theirs in zip(losses["ours"], losses["plain"], strict=True):
        assert abs(mine - theirs) <= TOLERANCE * theirs, f"the models differ: {losses}"

    bare = Loop(trainer.chunks[0], trainer.optimizer, trainer.scheduler, trainer)

    def bare_step() -> None:
        with mock.patch.object(RoutingStatistics, "record", lambda *args, **kwargs: None):
            bare.step(next(for_bare))

    bare_step()
    return {"plain": lambda: plain.step(next(for_plain)), "bare": bare_step, "ours": ours}, losses


def _draw(trainer: Trainer, steps: int) -> list[list[Batch]]:
    """This rank's microbatches of each step: the bare loops find them ready, ours makes them as it goes."""
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    return [list(itertools.islice(batches, trainer.shapes().num_microbatches)) for _ in range(steps)]


def main() -> None:
    config, result, repetitions, steps = sys.argv[1:]
    measured = measure(Path(config), int(repetitions), int(steps))
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(measured))
    groups.shutdown()


if __name__ == "__main__":
    main()
