"""What is said when a run begins and ends."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.training.trainer import Trainer


def print_beginning(trainer: Trainer, resumed_from: Path | None) -> None:
    """What trains, on what, and from where it goes on."""
    layout, plan = trainer.plan.layout, trainer.plan
    ranks = f"{layout.world_size} rank{'s' * (layout.world_size > 1)}"
    where = "CPU" if trainer.device.is_host else "GPU"
    dtype = next(trainer.chunks[0].parameters()).dtype
    print(
        f"{trainer.experiment.name}: {_count(plan.parameters.total)} parameters, "
        f"{_count(plan.parameters.active)} active; "
        f"{ranks} on {where}, {str(dtype).removeprefix('torch.')}"
    )
    if resumed_from is not None:
        done, wanted = trainer.iteration, trainer.experiment.training.train_iters
        print(f"resuming from {resumed_from}, {done} of {wanted} steps done")


def print_summary(trainer: Trainer) -> None:
    """Where everything lies, how good it is, and what to do next."""
    experiment, folder = trainer.experiment, trainer.run_folder
    done, wanted = trainer.iteration, experiment.training.train_iters
    print()
    if done < wanted:
        print(f"Stopped after step {done} of {wanted}; everything is saved.")
    else:
        print(f"Trained {done} step{'s' * (done > 1)}.")
    record = last_record(folder)
    loss, held_out = record.get("loss"), record.get("eval/loss")
    rows: list[tuple[str, str]] = []
    if loss is not None:
        rows.append(("loss", f"{loss:.4f} nats a token" + (f", held-out {held_out:.4f}" if held_out else "")))
    manifest = trainer.prepared.manifest
    if manifest is not None and manifest.unigram_entropy_nats is not None:
        rows.append(
            (
                "unigram entropy",
                f"{manifest.unigram_entropy_nats:.4f} nats a token (knowing only how frequent each is)",
            )
        )
    rows += [
        ("run folder", str(folder)),
        ("metrics", str(folder / "metrics.jsonl")),
        ("checkpoint", str(folder / "checkpoints" / f"iter_{done:07d}")),
    ]
    for name, value in rows:
        print(f"  {name:<16} {value}")
    config = folder / "resolved.yaml"
    print("Next:")
    if done < wanted:
        print(f"  go on        megatron-moe train {config}")
    else:
        print(f"  train on     megatron-moe train {config} training.train_iters={2 * wanted}")
    print(f"  check layout megatron-moe verify {config}")


def last_record(folder: Path) -> dict[str, float]:
    """The newest line of metrics.jsonl."""
    import json

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record: dict[str, float] = json.loads(lines[-1]) if lines else {}
    return record


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
