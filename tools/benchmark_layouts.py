"""Measure what each layout costs over the best one of as many ranks, for the table of docs/benchmarks.md.

    python tools/benchmark_layouts.py [ROUNDS]

A small MoE model on mock data, in float32. The layouts take turns, ROUNDS times; each time a layout trains
some steps after two to warm up. Its time is that of its fastest step: what else the machine does only adds.
Ranks share the machine's cores: the numbers say what a layout's communication and bubbles cost there, not on
GPUs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
for folder in (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tools"):
    sys.path.insert(0, str(folder))
os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch.distributed as dist  # noqa: E402
from distributed import ranks  # noqa: E402
from experiments import experiment, layout  # noqa: E402
from rich.box import SIMPLE_HEAD  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_moe.config.schema import Experiment  # noqa: E402
from megatron_moe.plan import plan  # noqa: E402
from megatron_moe.plan.layout import Layout  # noqa: E402
from megatron_moe.training.build import start  # noqa: E402

ROUNDS, STEPS, WARM_UP = 3, 4, 2

MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 512,
    "init_method_std": 0.02,
}
MOE = {"num_moe_experts": 8, "moe_ffn_hidden_size": 256}
TRAINING = {"global_batch_size": 8, "micro_batch_size": 1, "seq_length": 128}

EP1, ETP2 = {"expert_model_parallel_size": 1}, {"expert_tensor_parallel_size": 2}
EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
LAYOUTS: list[dict[str, Any]] = [
    layout(dp=2),
    layout(dp=2, **EP2),
    layout(tp=2, **EP1),
    layout(tp=2),
    layout(tp=2, **EP1, **ETP2),
    layout(cp=2),
    layout(cp=2, **EP2),
    layout(pp=2),
    layout(pp=2, vpp=2),
    layout(dp=4),
    layout(dp=4, **EP4),
    layout(tp=2, dp=2),
    layout(tp=2, dp=2, **EP4),
    layout(tp=2, dp=2, **EP2, **ETP2),
    layout(tp=4),
    layout(tp=2, cp=2),
    layout(cp=4, **EP4),
    layout(pp=2, dp=2, **EP2),
    layout(tp=2, pp=2),
    layout(tp=2, pp=2, vpp=2),
    layout(pp=4),
]


def seconds_of_steps(setup: Experiment, folder: Path, warm_up: int, steps: int) -> list[float]:
    """On every rank: the seconds of each step after those to warm up."""
    trainer = start(setup, plan.make(setup), folder)
    batches = trainer.microbatches(trainer.datasets.train, 0, shuffle=True)
    seconds = []
    for _ in range(warm_up + steps):
        dist.barrier()
        started = time.perf_counter()
        trainer.step(batches)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]


def main(rounds: int) -> None:
    """Measure and print."""
    # Under its importable name: the ranks don't know this script as __main__.
    from benchmark_layouts import seconds_of_steps as on_ranks

    setups = [
        experiment(parallel=parallel, model=MODEL, moe=MOE, training={**TRAINING, "train_iters": 100})
        for parallel in LAYOUTS
    ]
    layouts = [Layout.of(setup) for setup in setups]
    seconds: list[list[float]] = [[] for _ in setups]
    console = Console(highlight=False)
    with console.status("measuring") as status:
        for turn in range(rounds):
            for setup, its_layout, measured in zip(setups, layouts, seconds, strict=True):
                status.update(f"round {turn + 1} of {rounds}: {its_layout.axes}")
                with tempfile.TemporaryDirectory() as folder:
                    pool = ranks(its_layout.world_size)
                    measured += pool.run(on_ranks, setup, Path(folder), WARM_UP, STEPS)[0]
    best: dict[int, float] = {}
    for its_layout, measured in zip(layouts, seconds, strict=True):
        size = its_layout.world_size
        best[size] = min(best.get(size, min(measured)), *measured)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("ranks", justify="right")
    table.add_column("layout")
    table.add_column("seconds a step", justify="right")
    table.add_column("over the best", justify="right")
    rows = sorted(zip(layouts, seconds, strict=True), key=lambda row: (row[0].world_size, min(row[1])))
    for its_layout, measured in rows:
        size, fastest = its_layout.world_size, min(measured)
        table.add_row(str(size), its_layout.axes, f"{fastest:.3f}", f"{fastest / best[size]:.2f}")
    console.print(table)
    console.print(f"The fastest of {rounds * STEPS} steps; {os.cpu_count()} cores, one thread a rank.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
