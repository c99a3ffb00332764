"""Numbers and lists of ranks in few words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_SHOWN_RUNS = 4
_DURATIONS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (1, 1, "s"))
"""From how many seconds on, divided by what, in which unit."""

Units = Sequence[tuple[str, float]]
BYTES: Units = (("B", 1.0), ("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30))
SECONDS: Units = (("us", 1e-6), ("ms", 1e-3), ("s", 1.0))


def count(value: float) -> str:
    """A count in three to four digits: `146.4 B`, `13.85 M`, `512`."""
    return _scaled(value, ("", " K", " M", " B", " T"))


def flops(value: float) -> str:
    """Operations in three to four digits: `157.9 GFLOP`."""
    return _scaled(value, (" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def size(value: float) -> str:
    """Bytes in three to four digits: `16.38 KB`."""
    return _scaled(value, (" B", " KB", " MB", " GB", " TB"))


def number(value: float) -> str:
    """A number in four digits: `15,190`, `717.7`, `0.03391`."""
    return f"{float(f'{value:.4g}'):,.12g}"


def memory(value: float) -> str:
    """Bytes of a memory in three digits: `4.20 GiB`."""
    unit, text = in_one_unit([value], BYTES)
    return f"{text(value)} {unit}"


def _scaled(value: float, units: Sequence[str]) -> str:
    exponent = 0
    while float(f"{value:.4g}") >= 1000 and exponent < len(units) - 1:
        value /= 1000
        exponent += 1
    return f"{value:#.4g}{units[exponent]}" if exponent else f"{value:.4g}{units[0]}"


def duration(seconds: float) -> str:
    """A time in three digits: `812 us`, `41.2 s`, `10.9 days`."""
    for least, divisor, unit in _DURATIONS:
        if seconds >= least:
            return f"{_three_digits(seconds / divisor)} {unit}"
    unit, text = in_one_unit([seconds], SECONDS)
    return f"{text(seconds)} {unit}"


def in_one_unit(values: Iterable[float], units: Units, digits: int = 3) -> tuple[str, Callable[[float], str]]:
    """The unit in which numbers of a table are written, and how: the largest in so many digits."""
    largest = max(map(abs, values), default=0.0)
    unit, size = next((entry for entry in reversed(units) if largest >= entry[1]), units[0])
    decimals = _decimals(largest / size, digits)
    return unit, lambda value: f"{value / size:,.{decimals}f}"


def percent(part: float) -> str:
    """`34.9 %`."""
    return f"{100 * part:.1f} %"


def _three_digits(value: float) -> str:
    return f"{value:,.{_decimals(value, 3)}f}"


def _decimals(value: float, digits: int) -> int:
    """Digits behind the point of a number from 1 on that has so many in all."""
    return next((n for n in range(digits - 1, 0, -1) if round(value, n) < 10 ** (digits - n)), 0)


def plural(count: int, noun: str) -> str:
    """`1 rank`, `1,536 ranks`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def number_list(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours joined, a long list cut: `0-3`, `0, 4 ... 1532`; empty for none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(texts) > _SHOWN_RUNS:
        return f"{texts[0]}, {texts[1]} ... {texts[-1]}"
    return ", ".join(texts)


def group_list(groups: Sequence[Sequence[int]], width: int) -> str:
    """Groups of ranks: the first ones that fit into `width`, and the last: `0-3 | 4-7 | ... | 1532-1535`."""
    texts = [number_list(sorted(group)) for group in groups]
    everything = " | ".join(texts)
    if len(everything) <= width:
        return everything
    end = ["...", texts[-1]]
    shown = texts[:1]
    for text in texts[1:-2]:
        if len(" | ".join([*shown, text, *end])) > width:
            break
        shown.append(text)
    return " | ".join([*shown, *end])
