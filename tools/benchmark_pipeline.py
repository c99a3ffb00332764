#!/usr/bin/env python
"""What the planner's stages and recompute are worth: real training, beside an even split.

    python tools/benchmark_pipeline.py             # two ranks on this machine, both cases; some ten minutes
    python tools/benchmark_pipeline.py --case memory --turns 1

PP=2 over two ranks, with a vocabulary so large that the last stage, which holds the loss head, is heavy.
First `profile` measures the pieces. Then runs of the same experiment and seed take turns:

- speed: `pipeline.layers_per_stage: auto` against an even split.
- memory: the same where `launch.cluster.memory_gib` forbids to keep everything. Beside the planned stages and
  recompute stands the even split with the fewest recomputed layers, as many on every stage, that fit.

For each: tokens a second, whether losses are the same, each stage's time and memory, foretold and measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.loading import load
from megatron_moe.plan import against
from megatron_moe.plan.auto import resolve
from megatron_moe.plan.plan import Plan, make

EXPERIMENT = """\
name: pipeline
model:
  num_layers: {layers}
  hidden_size: 256
  num_attention_heads: 4
  num_query_groups: 2
  vocab_size: {vocabulary}
moe:
  num_moe_experts: 8
  moe_router_topk: 2
  moe_ffn_hidden_size: 256
  moe_router_load_balancing_type: aux_loss
  moe_aux_loss_coeff: 0.02
parallel: {{pipeline_model_parallel_size: 2}}
data: {{kind: mock}}
optimizer: {{lr: 1e-3}}
training: {{train_iters: {steps}, global_batch_size: {microbatches}, micro_batch_size: 1, seq_length: 256}}
logging: {{detail_interval: 2, curves: false}}
"""
AUTO = ["pipeline.layers_per_stage=auto", "recompute.layers_per_stage=auto"]
WARM_UP = 2
"""Steps that do not count."""


@dataclass(frozen=True)
class Way:
    """One way to run the experiment, and its runs so far."""

    name: str
    overrides: list[str]
    runs: list[Path]


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="benchmark-pipeline-") as folder:
        config = Path(folder) / "pipeline.yaml"
        config.write_text(
            EXPERIMENT.format(
                layers=options.layers,
                vocabulary=options.vocabulary,
                steps=options.steps,
                microbatches=options.microbatches,
            )
        )
        profile = Path(folder) / "profile.json"
        _command("profile", config, [], "--output", str(profile), show=True)
        measured = [f"launch.profile={profile}"]
        found = {}
        if options.case in ("speed", "both"):
            ways = [Way("even", measured, []), Way("planned", [*measured, *AUTO], [])]
            found["speed"] = _compare("speed", ways, config, Path(folder), options.turns)
        if options.case in ("memory", "both"):
            limit = options.memory or _binding(config, measured)
            limited = [*measured, f"launch.cluster.memory_gib={limit}", "launch.cluster.reserved_gib=0"]
            uniform = [*limited, f"recompute.layers_per_stage={_uniform(config, limited, options.layers)}"]
            ways = [Way("even, uniform recompute", uniform, []), Way("planned", [*limited, *AUTO], [])]
            found["memory"] = _compare("memory", ways, config, Path(folder), options.turns)
            found["memory"]["limit_gib"] = limit
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=("speed", "memory", "both"), default="both")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--memory", type=float, help="GiB a rank (default: midway between all and nothing)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return parser.parse_args()


def _compare(case: str, ways: list[Way], config: Path, folder: Path, turns: int) -> dict[str, Any]:
    for turn in range(turns):
        for number, way in enumerate(ways):
            root = folder / f"{case}-{number}-{turn}"
            _command("train", config, [*way.overrides, f"logging.root={root}"])
            way.runs.append(root / "pipeline")
    print(f"\n{case}")
    found: dict[str, Any] = {}
    for way in ways:
        plan = against.plan_of(way.runs[0])
        speeds = [_speed(run) for run in way.runs]
        compared = [against.compare(plan, _records(run)) for run in way.runs]
        found[way.name] = {
            "layers": [len(stage.layers) for stage in plan.stages],
            "recomputed": [stage.recomputed for stage in plan.stages],
            "tokens_per_second": speeds,
            "passes": _stages(compared),
            "memory_gib": [[pair.foretold, pair.measured] for pair in compared[0].memory_gib],
        }
        _print(way.name, found[way.name])
    first, second = (found[way.name] for way in ways)
    pairs = zip(second["tokens_per_second"], first["tokens_per_second"], strict=True)
    found["ratio"] = statistics.median(b / a for b, a in pairs)
    found["losses_differ_by"] = _losses_apart(ways)
    print(f"  planned over even: {found['ratio']:.3f} of the tokens/s")
    print(f"  largest relative difference of any step's loss: {found['losses_differ_by']:.1e}")
    return found


def _stages(compared: list[against.Comparison]) -> list[list[float]]:
    """[foretold, measured] milliseconds of a microbatch forward and backward, one entry a stage."""
    found = []
    for rank in range(len(compared[0].forward_ms)):
        foretold = compared[0].forward_ms[rank].foretold + compared[0].backward_ms[rank].foretold
        measured = [
            (one.forward_ms[rank].measured or 0) + (one.backward_ms[rank].measured or 0) for one in compared
        ]
        found.append([foretold, statistics.median(measured)])
    return found


def _print(name: str, found: dict[str, Any]) -> None:
    speeds = ", ".join(f"{speed:,.0f}" for speed in found["tokens_per_second"])
    print(f"  {name}: layers {found['layers']}, recomputed {found['recomputed']}: {speeds} tokens/s")
    for rank, ((foretold, measured), (planned, traced)) in enumerate(
        zip(found["passes"], found["memory_gib"], strict=True)
    ):
        print(
            f"    stage {rank}: {foretold:.1f} ms a microbatch foretold, {measured:.1f} measured "
            f"({foretold / measured - 1:+.1%}); {planned:.3f} GiB foretold, {traced:.3f} measured"
        )


def _records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["iteration"] > WARM_UP]


def _speed(run: Path) -> float:
    return statistics.median(record["tokens_per_second"] for record in _records(run))


def _losses_apart(ways: list[Way]) -> float:
    losses = [[record["loss"] for record in _records(way.runs[0])] for way in ways]
    return max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))


def _plan(config: Path, overrides: list[str]) -> Plan:
    return make(resolve(load(config, overrides)).experiment)


def _needed(plan: Plan) -> float:
    """GiB of the fullest rank."""
    return max(rank.memory.total - rank.memory.reserved for rank in plan.forecast.ranks) / 2**30


def _binding(config: Path, overrides: list[str]) -> float:
    """A limit midway between what the even split needs without recompute, and with all of it."""
    everything = _plan(config, [*overrides, "recompute.granularity=full"])
    return round((_needed(everything) + _needed(_plan(config, overrides))) / 2, 4)


def _uniform(config: Path, overrides: list[str], layers: int) -> str:
    """The fewest recomputed layers, as many on both stages, with which the even split fits."""
    for count in range(1, layers // 2 + 1):
        counts = f"[{count},{count}]"
        plan = _plan(config, [*overrides, f"recompute.layers_per_stage={counts}"])
        if all((rank.memory.headroom or 0) >= 0 for rank in plan.forecast.ranks):
            return counts
    raise SystemExit("the even split does not fit even if everything is recomputed: give a larger --memory")


def _command(name: str, config: Path, overrides: list[str], *arguments: str, show: bool = False) -> None:
    argv = [sys.executable, "-m", "megatron_moe", name, str(config), *arguments, *overrides]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stdout}{done.stderr}")
    if show:
        print(done.stdout, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
