"""`plan --inference`: what serving the model takes, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import Protocol

from rich.console import Console

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.inference import DType, Rank, Serving, serving
from megatron_moe.plan.tables import console_of_tables, print_table
from megatron_moe.plan.wording import count, plural, size

_GIB = 2.0**30


class Loaded(Protocol):
    """What `config` hands over: at least the filled experiment."""

    @property
    def experiment(self) -> Experiment: ...


def run(
    loaded: Loaded, gpus: int | None, as_json: bool, *, batch: int, context: int | None, dtype: DType
) -> None:
    """Print the answer to stdout. Raises InputError where the model cannot be split over so many GPUs."""
    experiment = loaded.experiment
    found = serving(experiment, gpus, batch, context, dtype)
    if as_json:
        sys.stdout.write(json.dumps({"name": experiment.name, **found.record()}, indent=2) + "\n")
        return
    console = console_of_tables()
    _print_head(console, experiment, found)
    _print_sizes(console, experiment, found)
    _print_ranks(console, found)


def _print_head(console: Console, experiment: Experiment, found: Serving) -> None:
    gpus = len(found.ranks)
    console.print(
        f"[bold]{experiment.name}[/] ({count(found.parameters)} parameters), served in {found.dtype} on "
        f"{plural(gpus, 'GPU')} of {experiment.launch.cluster.preset}"
    )
    request = f"{found.batch:,} x {found.context:,} tokens"
    if found.fits is None:
        console.print("The memory of a GPU is not known: set launch.cluster.memory_gib or its preset.\n")
        return
    rooms = [room for rank in found.ranks if (room := found.free_bytes(rank)) is not None]
    if found.fits:
        console.print(f"[bold green]It fits[/] with {request}.", end=" ")
    else:
        lacking = f"{-min(rooms) / _GIB:.1f} GiB more on {'the' if gpus == 1 else 'a'} GPU"
        console.print(f"[bold red]It does not fit[/]: {request} need {lacking}.", end=" ")
    if found.gpus_needed is None:
        console.print("No number of these GPUs would do.\n")
    elif found.gpus_needed == gpus:
        console.print("Fewer would not do.\n" if gpus > 1 else "\n")
    else:
        console.print(f"{plural(found.gpus_needed, 'GPU')} would do.\n")


def _print_sizes(console: Console, experiment: Experiment, found: Serving) -> None:
    whole = ""
    if found.memory_bytes is not None:
        memory = found.memory_bytes / _GIB
        gpus = len(found.ranks)
        whole = f" of {gpus * memory:.4g} GiB" + (f" ({gpus} x {memory:.4g})" if gpus > 1 else "")
    console.print(f"Weights   {size(found.weights_bytes)} = {found.weights_bytes / _GIB:,.1f} GiB{whole}")
    console.print(
        f"KV cache  {size(found.cache_bytes_per_token)} a token in bf16: {_cached(experiment, found)}"
    )
    most = found.most_tokens
    if most:
        sequences = most // found.context
        room = f"{plural(sequences, 'sequence')} of {found.context:,}" if sequences else "no whole sequence"
        console.print(
            f"Room for  {most:,} tokens of cache: {room}, or {found.batch:,} of {most // found.batch:,}"
        )
    console.print()


def _cached(experiment: Experiment, found: Serving) -> str:
    model = experiment.model
    layers = plural(model.num_layers, "layer")
    if latent := model.multi_latent_attention:
        width = f"{latent.kv_lora_rank} + {latent.qk_pos_emb_head_dim} compressed"
        return f"{width} x {layers}, on each GPU"
    heads = sum(rank.kv_heads for rank in found.ranks)
    copies = " with copies" if model.num_query_groups is not None and heads > model.num_query_groups else ""
    return f"keys and values x {plural(heads, 'head')}{copies} x {model.kv_channels} x {layers}"


def _print_ranks(console: Console, found: Serving) -> None:
    """One row for ranks that hold equally much."""
    groups: list[tuple[str, Rank]] = []
    for rank, entries in groupby(enumerate(found.ranks), key=lambda entry: entry[1]):
        numbers = [number for number, _ in entries]
        groups.append((str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", rank))
    request = found.batch * found.context
    columns = {
        "GPUs": [numbers for numbers, _ in groups],
        "query heads": [str(rank.query_heads) for _, rank in groups],
        "KV heads": [str(rank.kv_heads) for _, rank in groups],
        "weights": [f"{rank.weights_bytes / _GIB:,.2f}" for _, rank in groups],
        "KV cache": [f"{request * rank.cache_bytes_per_token / _GIB:,.2f}" for _, rank in groups],
        "reserved": [f"{found.reserved_bytes / _GIB:,.2f}" for _ in groups],
        "free": [f"{(found.free_bytes(rank) or 0) / _GIB:,.2f}" for _, rank in groups],
    }
    if not any(rank.kv_heads for _, rank in groups):
        del columns["KV heads"]
    if found.memory_bytes is None:
        del columns["free"]
    console.print(f"[bold]Each GPU in GiB[/], for {found.batch:,} x {found.context:,} tokens")
    print_table(console, columns, left=["GPUs"])
