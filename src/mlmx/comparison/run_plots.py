"""Loss and perplexity of a run as PNG."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image

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
        axes, figure = _frame(kind)
        for old in [*axes.lines, axes.get_legend()]:
            if old is not None:
                old.remove()
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
            if points:
                label = f"{name}  {points[-1][1]:,.5g}"  # beside the points, those of alike curves would overlap
                axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[name.split("/")[0]], label=label)
        axes.set_title(title, fontsize=10, y=1.0, parse_math=False)  # a name may hold a $
        axes.relim()
        axes.autoscale_view()
        if kind == "perplexity":
            low, high = axes.dataLim.intervaly
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6))
        if axes.lines:
            axes.legend(frameon=False, loc="upper right")  # "best" would try every place against every curve
        written.append(folder / f"{kind}.png")
        _save(figure, written[-1])
    return written


def _save(figure: Figure, path: Path) -> None:
    """As PNG in few colours: a third of the bytes, and packed in a fifth of the time."""
    canvas: Any = figure.canvas
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    drawn.quantize(palette=_palette(), dither=Image.Dither.NONE).save(path, compress_level=1)


@functools.cache
def _palette() -> Image.Image:
    """All colours of these pictures in steps to white, as edges are drawn."""
    inks = [to_rgb(colour) for colour in ("black", *COLOURS.values())]
    steps = np.linspace(0, 1, 16)[:, None]  # wider apart than Pillow tells colours apart
    blends = np.concatenate([255 * (steps + (1 - steps) * np.array(ink)) for ink in inks])
    palette = Image.new("P", (1, 1))
    palette.putpalette(blends.round().astype(np.uint8).tobytes())
    return palette


@functools.cache
def _frame(kind: str) -> tuple[Axes, Figure]:
    """Empty axes, kept for the next run of a sweep: making them and their ticks costs more than the curves."""
    figure = Figure(figsize=(7, 4.2), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.13, 0.12, 0.85, 0.79))  # a layout that measures every label costs twice the drawing
    axes.set_xlabel("epoch (0: before training)")
    axes.set_ylabel(UNITS[kind])
    axes.xaxis.set_label_coords(0.5, -0.085)  # else every tick label is measured for them, twice
    axes.yaxis.set_label_coords(-0.115, 0.5)
    axes.grid(alpha=0.3)
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if kind == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    return axes, figure
