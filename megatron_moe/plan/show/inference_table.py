"""`plan --inference`: what serving the model takes, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import Protocol

from rich.console import Console

from megatron_moe.config.schema import Experiment
from megatron_moe.plan import devices
from megatron_moe.plan.inference import DType, Rank, Serving, serving
from megatron_moe.plan.show.tables import console_of_tables, print_table
from megatron_moe.plan.wording import BYTES, count, in_one_unit, memory, plural, size


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
    gpus, device = len(found.ranks), devices.noun(experiment)
    console.print(
        f"[bold]{experiment.name}[/] ({count(found.parameters)} parameters), served in {found.dtype} on "
        f"{plural(gpus, device)} of {experiment.launch.cluster.preset}"
    )
    rooms = [room for rank in found.ranks if (room := found.free_bytes(rank)) is not None]
    if not rooms:
        console.print(f"The memory of a {device} is not known: launch.cluster.memory_gib says it.\n")
        return
    request = f"{found.batch:,} x {found.context:,} tokens"
    words = [f"[bold green]It fits[/] with {request}."]
    if not found.fits:
        where = f"{'the' if gpus == 1 else 'each'} {device}"
        words = [f"[bold red]It does not fit[/]: {request} need {memory(-min(rooms))} more on {where}."]
    if found.gpus_needed is None:
        words.append(f"No number of these {device}s would do.")
    elif found.gpus_needed != gpus:
        words.append(f"{plural(found.gpus_needed, device)} would do.")
    elif gpus > 1:
        words.append(f"Fewer {device}s would not do.")
    console.print(" ".join(words) + "\n")


def _print_sizes(console: Console, experiment: Experiment, found: Serving) -> None:
    gpus, each = len(found.ranks), found.memory_bytes
    unit, number = in_one_unit([found.weights_bytes], BYTES, digits=4)
    whole = "" if each is None else f" of {memory(gpus * each)}" + f" ({gpus} x {memory(each)})" * (gpus > 1)
    copied = gpus > 1 and experiment.model.multi_latent_attention
    copies = ", narrow projections on each rank" if copied else ""
    console.print(
        f"Weights   {size(found.weights_bytes)} = {number(found.weights_bytes)} {unit}{whole}{copies}"
    )
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
        return f"{width} x {layers}, on each rank"
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
    unit, number = in_one_unit([rank.weights_bytes for _, rank in groups], BYTES, digits=4)
    columns = {
        "ranks": [numbers for numbers, _ in groups],
        "query heads": [str(rank.query_heads) for _, rank in groups],
        "KV heads": [str(rank.kv_heads) for _, rank in groups],
        "weights": [number(rank.weights_bytes) for _, rank in groups],
        "KV cache": [number(request * rank.cache_bytes_per_token) for _, rank in groups],
        "reserved": [number(found.reserved_bytes) for _ in groups],
        "free": [number(found.free_bytes(rank) or 0.0) for _, rank in groups],
    }
    if not any(rank.kv_heads for _, rank in groups):
        del columns["KV heads"]
    if found.memory_bytes is None:
        del columns["free"]
    console.print(f"[bold]Memory of each rank in {unit}[/], for {found.batch:,} x {found.context:,} tokens")
    print_table(console, columns, left=["ranks"])
