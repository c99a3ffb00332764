"""How our pictures look, on paper and on a screen: the measured curves and the planned timeline alike."""

from __future__ import annotations

from typing import Any

INK, GREY, GRID = "#22262b", "#6b7280", "#e5e7eb"
# Okabe and Ito's colours: they stay apart for every eye, and as greys.
BLUE, SKY, GREEN, ORANGE = "#0072b2", "#56b4e9", "#009e73", "#e69f00"
YELLOW, VERMILION, PINK = "#f0e442", "#d55e00", "#cc79a7"
RED = "#b91c1c"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "path.simplify_threshold": 0.5,
}
"""For `matplotlib.rc_context`, over its defaults."""
