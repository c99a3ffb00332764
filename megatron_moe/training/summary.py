"""What is said when a run begins and ends, on the terminal and in log.txt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from megatron_moe.config.schema import Experiment
from megatron_moe.data.blend import Blend
from megatron_moe.engine.fast_paths import said_at_start
from megatron_moe.engine.machine import look
from megatron_moe.plan.batch_ramp import ramp_steps
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.profile import not_taken
from megatron_moe.plan.wording import count, plural, size
from megatron_moe.training.callbacks.curves import CURVES
from megatron_moe.training.terminal import say
from megatron_moe.training.trainer import Trainer


def say_beginning(trainer: Trainer, resumed_from: Path | None, log: Path) -> None:
    """What trains, on what, and from where it goes on."""
    plan = trainer.plan
    where = "CPU" if trainer.device.is_host else "GPU"
    dtype = trainer.device.resolve_precision(trainer.experiment.training.precision)
    with log.open("a", encoding="utf-8") as file:
        print(datetime.now().astimezone().isoformat(timespec="seconds"), file=file)
    lines = [
        f"{trainer.experiment.name}: {_parameters(plan)}; "
        f"{plural(plan.layout.world_size, 'rank')} on {where}, {str(dtype).removeprefix('torch.')}"
    ]
    if taken := _dispatcher(trainer):
        lines.append(taken)
    if missing := said_at_start(look()):
        lines.append(missing)
    if passed_over := not_taken(trainer.experiment):
        lines.append(passed_over)
    lines += trainer.datasets.said
    training = trainer.experiment.training
    steps = ramp_steps(training)
    if training.rampup_batch_size is not None and (steps is None or trainer.iteration < steps):
        reached = (
            "more than this run comes to" if steps is None else f"which step {steps + 1} is the first to have"
        )
        lines.append(
            f"The global batch grows from {training.rampup_batch_size[0]} to {training.global_batch_size} "
            f"sequences, {reached}"
        )
    if resumed_from is None and trainer.initialized_from is not None:
        lines.append(f"Starting from the weights in {trainer.initialized_from}")
    if resumed_from is not None:
        done, wanted = trainer.iteration, trainer.experiment.training.train_iters
        lines.append(f"Resuming from {resumed_from}: {done} of {plural(wanted, 'step')} done")
    say(lines, log)


def say_summary(trainer: Trainer, log: Path) -> None:
    """Where everything lies, how good it is, and what to do next."""
    experiment, folder = trainer.experiment, trainer.run_folder
    done, wanted = trainer.iteration, experiment.training.train_iters
    if done < wanted:
        lines = ["", f"Stopped after step {done} of {wanted}; everything is saved."]
    else:
        lines = ["", f"Trained {plural(done, 'step')}."]
    lines[1] += about_skips(folder / "metrics.jsonl", done)
    rows = [
        *_losses(trainer),
        *_seen(trainer),
        ("run folder", str(folder)),
        ("metrics", str(folder / "metrics.jsonl")),
        *_curves(trainer),
        ("checkpoint", str(folder / "checkpoints" / f"iter_{done:07d}")),
    ]
    lines += [f"  {name:<16} {value}" for name, value in rows]
    config = folder / "resolved.yaml"
    lines.append("Next:")
    if done < wanted:
        lines.append("  go on        the same command again")
    else:
        lines.append(f"  train on     the same command with {to_train_on(experiment)}")
    lines += _to_look_at(trainer)
    lines.append(f"  check layout megatron-moe verify {config}")
    say(lines, log)


def about_skips(metrics: Path, done: int) -> str:
    """What is said of steps that changed no weight, of `done` in all, those of earlier starts included."""
    with metrics.open(encoding="utf-8") as lines:
        skipped = sum('"skipped": ' in line for line in lines)
    if not skipped:
        return ""
    which = f"{skipped} of them {'was' if skipped == 1 else 'were'}"
    if skipped == done:
        which = "It was" if done == 1 else f"All {done} were"
    return f" {which} skipped and changed no weight; metrics.jsonl says why."


def _parameters(plan: Plan) -> str:
    active = f", {count(plan.parameters.active)} active" if plan.num_moe_experts else ""
    return f"{count(plan.parameters.total)} parameters{active}"


def _dispatcher(trainer: Trainer) -> str | None:
    """What `auto` takes; None where a key names it or no token travels."""
    moe, dispatch = trainer.experiment.moe, trainer.plan.dispatch
    if moe is None or dispatch is None or moe.moe_token_dispatcher_type != "auto" or not dispatch.journeys:
        return None
    costs = {journey.dispatcher: journey.bytes for journey in dispatch.journeys}
    others = ", ".join(f"{name} {size(cost)}" for name, cost in costs.items() if name != dispatch.dispatcher)
    sent, precision = size(costs[dispatch.dispatcher]), {2: "bf16", 4: "fp32"}[dispatch.element_size]
    return (
        f"Tokens travel by {dispatch.dispatcher}: {sent} a token and MoE layer forward, "
        f"counted in {precision} ({others})"
    )


def _curves(trainer: Trainer) -> list[tuple[str, str]]:
    picture = trainer.run_folder / CURVES
    return [("curves", str(picture))] if trainer.experiment.logging.curves and picture.exists() else []


def _to_look_at(trainer: Trainer) -> list[str]:
    """Commands that show the run's numbers."""
    logging, folder = trainer.experiment.logging, trainer.run_folder
    lines = []
    if logging.tensorboard:
        lines.append(f"  look         tensorboard --logdir {folder / 'tensorboard'}")
    if logging.wandb is not None and any(folder.glob("wandb/offline-run-*")):
        lines.append(f"  upload       wandb sync {folder}/wandb/offline-run-*")
    return lines


def to_train_on(experiment: Experiment) -> str:
    """What trains a finished run for twice as many iterations; defaults that follow from it grow too."""
    return f"training.train_iters={2 * experiment.training.train_iters}"


def _losses(trainer: Trainer) -> list[tuple[str, str]]:
    rows = []
    loss, held_out = trainer.last_record.get("loss"), trainer.last_record.get("eval/loss")
    if loss is not None and math.isfinite(loss):
        text = f"{loss:.4f} nats a token"
        rows.append(("loss", text if held_out is None else f"{text}, held-out {held_out:.4f}"))
    entropies = {
        source.name: f"{source.manifest.unigram_entropy_nats:.4f}" for source in trainer.prepared.sources
    }
    if entropies:
        text = f"{_by_source(entropies)} nats a token (the loss without any context)"
        rows.append(("unigram entropy", text))
    if (records := trainer.prepared.instruction) is not None:
        entropy = records.train.manifest.target_entropy_nats
        rows.append(("unigram entropy", f"{entropy:.4f} nats a target (the loss without any context)"))
    return rows


def _seen(trainer: Trainer) -> list[tuple[str, str]]:
    """How often the run has gone through its data, that of earlier starts included."""
    if not trainer.prepared.reads_files:
        return []
    train, samples = trainer.datasets.train, trainer.consumed_samples
    epochs = train.epochs(samples) if isinstance(train, Blend) else {"": samples / len(train)}
    return [("epochs", _by_source({name: f"{times:.3g}" for name, times in epochs.items()}))]


def _by_source(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}".strip() for name, value in values.items())
