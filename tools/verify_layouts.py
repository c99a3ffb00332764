"""`make verify`: every layout of tests/training/layout_cases.py against one process, as one table.

    python tools/verify_layouts.py [PART_OF_A_NAME ...]

Each case trains one step of a tiny model on up to 4 ranks of this machine, then in one process from the same
weights and batches. It passes where loss, gradient norm, every gradient and every update agree as `verify`
demands, in float32. Ends with 1 where a case does not.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
for folder in (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "training"):
    sys.path.insert(0, str(folder))
# Ranks that share few cores only fight each other with more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":  # a test that imports this keeps its warnings
    # What the libraries warn of at import, here and in each rank, is not about the layouts.
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch.distributed as dist  # noqa: E402
from distributed import RankError, ranks  # noqa: E402
from layout_cases import LAYOUTS, Sections, experiment_of, verify  # noqa: E402
from rich.box import SIMPLE_HEAD  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.live import Live  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_moe.plan.layout import Layout  # noqa: E402


@dataclass
class Outcome:
    """What came out of one case. Differences are relative to one process; `reasons` is empty where it
    passed."""

    gradients: float | None
    loss: float | None
    seconds: float
    reasons: list[str]


def outcome(sections: Sections) -> Outcome:
    """Run one case."""
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = verify(Path(folder), **sections)
    except RankError as error:
        return Outcome(None, None, time.perf_counter() - started, [str(error).splitlines()[-1]])
    step = report.steps[0]
    seconds = time.perf_counter() - started
    return Outcome(step.gradients.difference, step.loss_difference, seconds, report.failures)


def main(wanted: list[str]) -> int:
    """Run the cases that have one of `wanted` in their name, all without any. Returns the exit code."""
    cases = {
        name: sections
        for name, sections in LAYOUTS.items()
        if not wanted or any(part.lower() in name.lower() for part in wanted)
    }
    if not cases:
        print(
            f"No case has {' or '.join(wanted)} in its name. They are: {'; '.join(LAYOUTS)}", file=sys.stderr
        )
        return 2
    layouts = {name: Layout.of(experiment_of(sections)) for name, sections in cases.items()}
    started = time.perf_counter()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    console = Console(highlight=False)
    console.print(f"{len(cases)} layouts against one process in float32, {versions}")
    with console.status("starting the ranks"):
        for size in sorted({1, *(layout.world_size for layout in layouts.values())}):
            ranks(size).run(dist.get_rank)
    table, failed = _table(), {}
    with Live(table, console=console, auto_refresh=False, transient=True) as live:
        for name, sections in cases.items():
            found = outcome(sections)
            if found.reasons:
                failed[name] = found.reasons
            _add(table, name, layouts[name], found)
            live.refresh()
    console.print(table)
    for name, reasons in failed.items():
        console.print(f"[red]{name}[/]: ", end="")
        console.print("; ".join(reasons), markup=False)
    console.print(
        "gradients: the worst ||g - g_ref|| / ||g_ref|| of a tensor; loss: relative; both of step 1."
    )
    result = f"{len(failed)} of {len(cases)} layouts FAIL" if failed else f"All {len(cases)} layouts PASS"
    style = "bold red" if failed else "bold green"
    console.print(f"{result} after {time.perf_counter() - started:.0f} s.", style=style)
    return 1 if failed else 0


def _table() -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("case")
    table.add_column("layout", no_wrap=True)
    for title in ("ranks", "gradients", "loss", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _add(table: Table, name: str, layout: Layout, found: Outcome) -> None:
    differences = ["-" if it is None else f"{it:.0e}" for it in (found.gradients, found.loss)]
    verdict = "[bold red]FAIL[/]" if found.reasons else "[green]PASS[/]"
    seconds = f"{found.seconds:.1f}"
    axes = layout.axes.replace(" ", "").replace(",", " ")  # TP 2, EP 2 as names of cases say it: TP2 EP2
    table.add_row(name, axes, str(layout.world_size), *differences, seconds, verdict)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
