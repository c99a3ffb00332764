"""Results as a table on the terminal, and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_moe.config.errors import not_written
from megatron_moe.inference.evaluation.result import Result


def print_results(results: Sequence[Result]) -> None:
    """A row for each metric."""
    if not results:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric", no_wrap=True)
    for name in ("value", "± error", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        for row, (name, metric) in enumerate(result.metrics.items()):
            error = "" if metric.error is None else f"{metric.error:.4f}"
            heading = (result.name, f"{result.samples:,}") if row == 0 else ("", "")
            table.add_row(heading[0], name, f"{metric.value:.4f}", error, heading[1])
    Console(highlight=False, markup=False).print(table)
    plain = Console(highlight=False, soft_wrap=True, markup=False)
    for result in results:
        for note in result.notes:
            plain.print(f"{result.name}: {note}")


def print_comparison(found: dict[str, Any], folder: str) -> None:
    """Ours against transformers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("on the same text")
    for name in ("here", "transformers", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("loss", "perplexity"):
        mine, theirs = found[name], found[f"{name}_of_transformers"]
        table.add_row(name, f"{mine:.6f}", f"{theirs:.6f}", f"{abs(mine - theirs):.1e}")
    table.add_row("largest difference of a logit", "", "", f"{found['largest_logit_difference']:.1e}")
    table.add_row("largest logit", "", f"{found['largest_logit']:.2f}", "")
    print_share = "{:.2%}".format
    table.add_row("same most likely token", print_share(found["same_most_likely_token"]), "", "")
    table.add_row("same greedy tokens", print_share(found["same_greedy_tokens"]), "", "")
    table.add_row("same greedy texts", print_share(found["same_greedy_texts"]), "", "")
    Console(highlight=False, markup=False).print(table)
    Console(highlight=False, soft_wrap=True, markup=False).print(
        f"Against {folder}: {found['tokens']:,} tokens in {found['windows']} windows, "
        f"{found['greedy_texts']} greedy texts"
    )


def write(path: Path, report: dict[str, Any]) -> None:
    """The whole report, or nothing. Raises InputError or RunError where it cannot be written."""
    aside = path.with_name(f"{path.name}.part")
    try:
        aside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise not_written(f"{path}, which was to take the results", error) from error
