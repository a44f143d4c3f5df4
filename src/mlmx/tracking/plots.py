"""Loss and perplexity of a run as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

CURVES = {
    "loss": ("train/loss", "eval/loss", "heldout/loss"),
    "perplexity": ("eval/perplexity", "heldout/perplexity"),
}
UNITS = {"loss": "loss (nats per masked token)", "perplexity": "perplexity (log scale)"}
COLOURS = {"train": "#8a8a8a", "eval": "#0b6e99", "heldout": "#b5482a"}


def draw(rows: Sequence[Mapping[str, Any]], folder: Path, title: str) -> list[Path]:
    """``loss.png`` and ``perplexity.png`` in ``folder`` from the rows of metrics.jsonl; returns their paths."""
    folder.mkdir(exist_ok=True)
    written = []
    for kind, names in CURVES.items():
        figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            if points:
                section = name.split("/")[0]
                axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[section], label=name)
                axes.annotate(f"{points[-1][1]:,.4g}", points[-1], xytext=(6, 4), textcoords="offset points")
        if kind == "perplexity":
            axes.set_yscale("log")
        axes.set_xlabel("epoch (0: before training)")
        axes.set_ylabel(UNITS[kind])
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(frameon=False)
        written.append(folder / f"{kind}.png")
        figure.savefig(written[-1])
    return written
