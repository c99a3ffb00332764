"""Functions that tests of training run on rank processes."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.errors import InputError, RunError
from megatron_moe.config.schema import Experiment
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import unwrap
from megatron_moe.plan import plan
from megatron_moe.training import checkpoint
from megatron_moe.training.build import start
from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.run import standard_callbacks
from megatron_moe.training.starting import resume_or_begin
from megatron_moe.training.trainer import Trainer

Look = Callable[[Trainer], Any]


class StopAt(Callback):
    """Stops as after a signal, on all ranks, after `iteration` steps."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_step(self, trainer: Trainer, record: Record) -> None:
        trainer.stopped = trainer.iteration == self.iteration


def begin(experiment: Experiment, run: Path) -> Trainer:
    run.mkdir(parents=True, exist_ok=True)
    return start(experiment, plan.make(experiment), run)


def train(experiment: Experiment, run: Path, stop_at: int = 0) -> int:
    """What `train` does in each rank, up to step `stop_at`. Returns the iteration it began from."""
    trainer = begin(experiment, run)
    resume_or_begin(trainer)
    began = trainer.iteration
    trainer.callbacks = [StopAt(stop_at), *standard_callbacks(run, experiment)]
    trainer.fit()
    dist.barrier()
    return began


def train_spoiled(experiment: Experiment, run: Path, spoiled: int) -> int:
    """As `train`; the gradients of the first `spoiled` steps hold a NaN."""
    from megatron.core.utils import get_model_config

    trainer = begin(experiment, run)
    checkpoint.resume(trainer)
    began = trainer.iteration
    config = get_model_config(trainer.chunks[0])
    finalize, weight = config.finalize_model_grads_func, next(trainer.chunks[0].parameters())

    def spoil(*args: Any, **kwargs: Any) -> None:
        if trainer.iteration < spoiled:
            weight.main_grad.fill_(float("nan"))
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = spoil
    trainer.callbacks = standard_callbacks(run, experiment)
    trainer.fit()
    dist.barrier()
    return began


def resumed(experiment: Experiment, run: Path) -> tuple[int, str]:
    """The iteration from which `train` began, and what it said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        began = train(experiment, run)
    return began, said.getvalue()


def train_all(experiments: list[tuple[Experiment, Path]]) -> None:
    """Several runs, one after the other."""
    for experiment, run in experiments:
        train(experiment, run)
        groups.destroy()


def refused(experiment: Experiment, run: Path) -> str:
    """The words of the InputError with which a resume ends."""
    try:
        train(experiment, run)
    except InputError as error:
        return str(error)
    return ""


def steps(experiment: Experiment, run: Path, count: int) -> list[Record]:
    """The records of the first steps, nothing written."""
    trainer = begin(experiment, run)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    return [trainer.step(batches) for _ in range(count)]


def losses_by_hand(experiment: Experiment, run: Path) -> tuple[float, float]:
    """The first step's loss as recorded, and from the logits in float64. For one process."""
    trainer = begin(experiment, run)
    by_hand = hand_loss(trainer, trainer.datasets.train, 1, shuffle=True)
    record = trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    return record["loss"], by_hand


def evaluations(experiment: Experiment, run: Path, by_hand: bool) -> tuple[float, float | None]:
    """Held-out loss as `evaluate` has it, and from the logits in float64, which takes one process."""
    trainer = begin(experiment, run)
    valid, count = trainer.datasets.valid, experiment.training.eval_iters
    assert valid is not None
    (loss,) = trainer.evaluate(valid, count).values()
    return loss, hand_loss(trainer, valid, count, False) if by_hand else None


def hand_loss(trainer: Trainer, dataset: Any, iterations: int, shuffle: bool) -> float:
    """Mean over all target tokens of -log softmax(logits)[label]."""
    batches = trainer.microbatches(dataset, 0, shuffle)
    model = unwrap(trainer.chunks[0]).eval()
    losses = []
    with torch.no_grad():
        for _ in range(iterations * trainer.shapes().num_microbatches):
            batch = next(batches)
            logits = model(batch["tokens"], batch["position_ids"], None)
            chances = logits.double().log_softmax(dim=-1)
            losses.append(-chances.gather(-1, batch["labels"].unsqueeze(-1)).flatten())
    model.train()
    return float(torch.cat(losses).mean())


def with_a_broken_gradient(experiment: Experiment, run: Path) -> list[dict[str, Any]]:
    """Four steps; in the second the last rank's experts have a NaN in their gradient, and in the fourth no
    token is a target.

    Returns for each step the record as the file has it, and whether any weight of this rank changed.
    """
    from megatron.core.utils import get_model_config

    from megatron_moe.training.callbacks.metrics_file import without_nan

    trainer = begin(experiment, run)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    expert: Any = next(weight for name, weight in trainer.chunks[0].named_parameters() if "experts" in name)
    config = get_model_config(trainer.chunks[0])
    finalize = config.finalize_model_grads_func

    def spoil(*args: Any, **kwargs: Any) -> None:
        expert.main_grad.flatten()[0] = float("nan")
        finalize(*args, **kwargs)

    result = []
    no_targets = (
        {**batch, **{key: 0 * batch[key] for key in ("loss_mask", "num_targets")}} for batch in batches
    )
    for number in range(4):
        before = [weight.detach().clone() for weight in trainer.chunks[0].parameters()]
        breaks = number == 1 and dist.get_rank() == dist.get_world_size() - 1
        config.finalize_model_grads_func = spoil if breaks else finalize
        record = trainer.step(no_targets if number == 3 else batches)
        changed = any(
            not torch.equal(a, b) for a, b in zip(before, trainer.chunks[0].parameters(), strict=True)
        )
        result.append({"record": without_nan(record), "changed": changed})
    return result


def decays(experiment: Experiment, run: Path) -> dict[str, float]:
    """By which part of itself each parameter shrinks in a step whose gradients are all zero."""
    from megatron.core.utils import get_model_config

    trainer = begin(experiment, run)
    chunk = unwrap(trainer.chunks[0])
    config = get_model_config(trainer.chunks[0])
    finalize = config.finalize_model_grads_func

    def empty(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        trainer.chunks[0].zero_grad_buffer()  # type: ignore[operator]

    config.finalize_model_grads_func = empty
    for weight in chunk.parameters():
        if weight.dim() == 1:
            torch.nn.init.ones_(weight)  # so that a bias has something to lose
    trainer.optimizer.reload_model_params()
    before = {name: weight.detach().clone() for name, weight in chunk.named_parameters()}
    trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    return {
        name: float(1 - (weight.detach().double().sum() / before[name].double().sum()))
        for name, weight in chunk.named_parameters()
    }


def clipped(experiment: Experiment, run: Path) -> tuple[float, float]:
    """The gradient norm that is recorded, and that of the gradients which the optimizer took. For one
    process."""
    trainer = begin(experiment, run)
    record = trainer.step(trainer.microbatches(trainer.datasets.train, 0, shuffle=True))
    given = [
        weight.grad.double().square().sum()
        for part in trainer.optimizer.chained_optimizers
        for weight in part.get_parameters()
        if weight.grad is not None
    ]
    return record["grad_norm"], float(torch.stack(given).sum().sqrt())


def rates(experiment: Experiment, run: Path) -> list[tuple[float, float]]:
    """Learning rate of each step of the run: as recorded, and as the optimizer used it."""
    trainer = begin(experiment, run)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    found = []
    for _ in range(experiment.training.train_iters):
        record = trainer.step(batches)
        used = {group["lr"] for group in trainer.optimizer.param_groups}
        assert len(used) == 1
        found.append((record["lr"], used.pop()))
    return found


def saves_on_a_full_disk(experiment: Experiment, run: Path) -> tuple[str, list[str], int]:
    """The words with which a save ends where no file may grow beyond 20 kB, what lies in the checkpoints'
    folder then, and the iteration that is saved when it may again."""
    trainer = begin(experiment, run)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    trainer.step(batches)
    checkpoint.save(trainer)
    trainer.step(batches)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    words = ""
    try:
        checkpoint.save(trainer)
    except RunError as error:
        words = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    dist.barrier()
    checkpoint.save(trainer)
    return words, left, int((run / "checkpoints" / "latest").read_text().removeprefix("iter_"))


def precision(experiment: Experiment, run: Path) -> str:
    return str(next(begin(experiment, run).chunks[0].parameters()).dtype)


class SignalToTheLastRank(Callback):
    """Sends SIGTERM to one rank while it trains its second step."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if trainer.iteration == 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_by_the_last_rank(experiment: Experiment, run: Path) -> int:
    """The number of steps done."""
    trainer = begin(experiment, run)
    trainer.callbacks = [*standard_callbacks(run, experiment), SignalToTheLastRank()]
    try:
        trainer.fit()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dist.barrier()
    return trainer.iteration
