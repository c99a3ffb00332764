"""`megatron-moe plan --search`: the fastest layouts as a table, and the best one as YAML."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_moe.config.errors import not_written
from megatron_moe.config.loading import Loaded
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.parameters import FORMULA
from megatron_moe.plan.search.search import Found, Search, search
from megatron_moe.plan.search.space import OTHER_SPLITS
from megatron_moe.plan.show.tables import console_of_tables, print_table
from megatron_moe.plan.wording import count, duration, percent, plural

_GIB = 2.0**30
_SAID_REASONS = 2
_WIDTH = 98


def run(loaded: Loaded, config: Path, gpus: int, as_json: bool, overlay: Path | None) -> None:
    """Search, and print what was found to stdout.

    Args:
        config: the file that the overlay extends.
        overlay: where the best layout is written as YAML; None: it is printed.

    Raises InputError.
    """
    found = search(loaded.experiment, gpus)
    text = overlay_of(found.best[0], loaded.experiment)
    if overlay is not None:
        try:
            overlay.write_text(f"extends: [{_relative(config, overlay)}]\n\n{text}")
        except OSError as error:
            raise not_written(f"{overlay}: the overlay cannot be written", error) from error
    if as_json:
        sys.stdout.write(json.dumps(_record(found, text), indent=2) + "\n")
        return
    console = console_of_tables()
    _print_found(console, loaded.experiment.name, found, gpus)
    if overlay is not None:
        console.print(f"The first one is written to {overlay}, which extends {config}.")
    else:
        console.print(
            "[bold]The first one as YAML[/], which extends the experiment (--overlay FILE writes it)\n"
        )
        console.print(text, markup=False, soft_wrap=True)


def overlay_of(found: Found, original: Experiment) -> str:
    """The keys that make the original experiment run in that layout, as YAML."""
    experiment = found.experiment
    parallel = experiment.parallel.model_dump(include=_PARALLEL)
    sections: dict[str, dict[str, Any]] = {
        "parallel": parallel,
        "pipeline": {
            "layers_per_stage": experiment.pipeline.layers_per_stage,
            **{key: None for key in OTHER_SPLITS if getattr(original.pipeline, key) is not None},
        },
        "recompute": _recompute(found),
        "training": {"micro_batch_size": experiment.training.micro_batch_size},
    }
    if experiment.moe is not None and original.moe is not None:
        sections["moe"] = {"moe_token_dispatcher_type": found.dispatcher}
        for key in ("overlap_moe_expert_parallel_comm", "moe_permute_fusion"):
            if getattr(original.moe, key):
                sections["moe"][key] = getattr(experiment.moe, key)
    lines = []
    for name, keys in sections.items():
        lines.append(f"{name}:")
        lines += [f"  {key}: {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


_PARALLEL = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "data_parallel_size",
    "sequence_parallel",
}


def _recompute(found: Found) -> dict[str, Any]:
    """The section, null where a key of the original experiment must not count."""
    recompute = found.experiment.recompute
    is_whole = recompute.granularity == "full"
    return {
        "granularity": recompute.granularity,
        "method": recompute.method,
        "layers_per_stage": recompute.layers_per_stage if is_whole else None,
        "modules": recompute.modules if recompute.granularity == "selective" else None,
    }


def _print_found(console: Console, name: str, found: Search, gpus: int) -> None:
    layouts = plural(found.considered, "layout")
    too_large = f", of which {found.too_large:,} cannot fit" if found.too_large else ""
    console.print(
        f"[bold]{name} on {plural(gpus, 'GPU')}[/]: {layouts}{too_large}; "
        f"{found.placed:,} placed and simulated\n"
    )
    best = found.best
    columns = {
        "": [str(place) for place in range(1, len(best) + 1)],
        "TP": [str(one.candidate.tensor) for one in best],
        "CP": [str(one.candidate.context) for one in best],
        "PP": [str(one.candidate.pipeline) for one in best],
        "VPP": [str(one.candidate.chunks) for one in best],
        "DP": [str(one.candidate.data) for one in best],
        "EP": [str(one.candidate.expert) for one in best],
        "ETP": [str(one.candidate.expert_tensor) for one in best],
        "micro-\nbatch": [str(one.candidate.micro_batch_size) for one in best],
        "re-\ncomputed": [_recomputed(one) for one in best],
        "dispatcher": [one.dispatcher or "" for one in best],
        "tokens/s\na GPU": [count(one.forecast.tokens_per_second_per_gpu) for one in best],
        "MFU": ["" if one.forecast.mfu is None else percent(one.forecast.mfu) for one in best],
        "free\nGiB": [_free(one) for one in best],
        "what it waits for": [_reasons(one) for one in best],
    }
    for title in ("CP", "VPP", "ETP", "EP"):
        if set(columns[title]) == {"1"}:
            del columns[title]
    for title in ("dispatcher", "MFU", "free\nGiB"):
        if set(columns[title]) == {""}:
            del columns[title]
    print_table(
        Console(highlight=False, width=_WIDTH),
        columns,
        left=["re-\ncomputed", "dispatcher", "what it waits for"],
        folded=["what it waits for"],
    )
    first = best[0].forecast
    console.print(
        f"The first one takes {duration(first.iteration_s)} an iteration, {duration(first.days * 86400)} for "
        f"the run, with times from {first.source}. MFU: FLOPs a token are {FORMULA}.\n"
    )


def _recomputed(found: Found) -> str:
    recompute = found.experiment.recompute
    if recompute.granularity == "selective":
        return "modules"
    counts, layers = recompute.layers_per_stage, found.experiment.pipeline.layers_per_stage
    assert isinstance(counts, list) and isinstance(layers, list)
    again = sum(min(held, counts[stage % len(counts)]) for stage, held in enumerate(layers))
    return f"{plural(again, 'layer')}" if again else "nothing"


def _free(found: Found) -> str:
    left = [rank.memory.headroom for rank in found.forecast.ranks if rank.memory.headroom is not None]
    return f"{min(left) / _GIB:.1f}" if left else ""


def _reasons(found: Found) -> str:
    """The largest parts of an iteration in which nothing is computed: `pipeline 12 %, exchange 8 %`."""
    forecast = found.forecast
    parts = {
        "pipeline": forecast.bubble * forecast.pipeline_s,
        "exchange": forecast.exposed_all_to_all_s,
        "gradients": forecast.gradient_s,
        "update": forecast.optimizer_s,
    }
    shares = {name: seconds / forecast.iteration_s for name, seconds in parts.items()}
    largest = sorted(shares, key=lambda name: -shares[name])[:_SAID_REASONS]
    return ", ".join(f"{name} {shares[name]:.0%}" for name in largest if shares[name] >= 0.01)


def _record(found: Search, overlay: str) -> dict[str, Any]:
    return {
        "considered": found.considered,
        "too_large": found.too_large,
        "placed": found.placed,
        "flops_formula": FORMULA,
        "best": [
            {
                **asdict(one.candidate),
                "layers_per_stage": one.experiment.pipeline.layers_per_stage,
                "recompute": _recompute(one),
                "dispatcher": one.dispatcher,
                "forecast": asdict(one.forecast),
            }
            for one in found.best
        ],
        "overlay": overlay,
    }


def _relative(config: Path, overlay: Path) -> str:
    """How the overlay names the file that it extends."""
    return json.dumps(os.path.relpath(config.resolve(), overlay.resolve().parent))
