"""How tables of the plan look: no frame, one rule below the titles, nothing cut off."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_LEAST_WIDTH = 80


def console_of_tables() -> Console:
    """Stdout. In a narrower window lines break, but no number is cut."""
    console = Console(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)
    return console


def print_table(
    console: Console,
    columns: Mapping[str, Sequence[str]],
    *,
    left: Collection[str] = (),
    folded: Collection[str] = (),
) -> None:
    """Title -> cells, and an empty line below. Numbers stand to the right.

    Args:
        left: columns of words.
        folded: those of them that take as many lines as they need.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for title in columns:
        table.add_column(
            title,
            justify="left" if title in left else "right",
            no_wrap=title not in folded,
            overflow="fold" if title in folded else "ellipsis",
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    console.print()
