"""Plots as PNG, all in one style: the curves of one run, and the curves and dials of several side by side.

What is drawn of several is the loss that their table is judged by. Runs that may not be ranked together are not drawn
together: the plots show the largest group.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter
from PIL import Image

from mlmx.comparison.curves import Curves, curves_of, without_step_0
from mlmx.comparison.ranking import YARDSTICK, Table
from mlmx.comparison.rows import Row
from mlmx.comparison.text import keys_shown, shortened, value_text

DPI = 130
COLOURS = ("#0b6e99", "#b5482a", "#3a7d44", "#7b4ea3", "#c08a1e", "#4a4a4a", "#c2588f", "#2aa198")
GREY, INK = "#8f8f8f", "#333333"
EPOCH = "epoch (0: before training)"
OF_A_RUN = {
    "loss (nats per masked token)": ("train/loss", "eval/loss", "heldout/loss"),
    "perplexity (log scale)": ("eval/perplexity", "heldout/perplexity"),
}
MANY = len(COLOURS)  # more curves than these are coloured by their loss, not one by one


literally = functools.partial(rc_context, {"text.parse_math": False})  # names and values may hold a $


def new_figure(width: float = 7.5, height: float = 4.6) -> Figure:
    """A figure of that many inches, made without pyplot and its state."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def styled(axes: Axes, x: str = "", y: str = "") -> Axes:
    """The axes with their labels, and a grid behind what is drawn."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.set(xlabel=x, ylabel=y)
    return axes


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG of few colours: a third of the bytes, and packed in a fifth of the time."""
    canvas: Any = figure.canvas
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, compress_level=1)
    return path


def plot_run(rows: Sequence[Mapping[str, Any]], folder: Path, title: str) -> list[Path]:
    """``loss.png`` and ``perplexity.png`` in ``folder`` from the rows of metrics.jsonl; returns their paths."""
    folder.mkdir(exist_ok=True)
    written = []
    for label, names in OF_A_RUN.items():
        axes, figure = _frame(label)
        for old in filter(None, [*axes.lines, axes.get_legend()]):
            old.remove()
        colours = {"train": GREY, "eval": COLOURS[0], "heldout": COLOURS[1]}
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
            if points:
                told = f"{name}  {points[-1][1]:,.5g}"  # beside the points, those of alike curves would overlap
                axes.plot(*zip(*points, strict=True), marker="o", color=colours[name.split("/")[0]], label=told)
        axes.set_title(title, fontsize=10, y=1.0)
        axes.relim()
        axes.autoscale_view()
        if axes.get_yscale() == "log":
            low, high = axes.dataLim.intervaly
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6))
        if axes.lines:
            axes.legend(frameon=False, loc="upper right")  # "best" would try every place against every curve
        written.append(save(figure, folder / f"{label.split()[0]}.png"))
    return written


@functools.cache
@literally()
def _frame(label: str) -> tuple[Axes, Figure]:
    """Empty axes, kept for the next run of a sweep: making them and their ticks costs more than the curves."""
    figure = Figure(figsize=(7, 4.2), dpi=110)  # a layout that measures every label costs twice the drawing
    FigureCanvasAgg(figure)
    axes = styled(figure.add_axes((0.13, 0.12, 0.85, 0.79)), EPOCH, label)
    axes.xaxis.set_label_coords(0.5, -0.085)  # else every tick label is measured for them, twice
    axes.yaxis.set_label_coords(-0.115, 0.5)
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if label.startswith("perplexity"):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    return axes, figure


@literally()
def plot_table(table: Table, folder: Path) -> list[Path]:
    """``curves.png``, ``parallel.png`` and ``<loss>_against_<dial>.png`` in ``folder``; returns the paths.

    A plot for which there is nothing to draw is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Figure] = {}
    curves = curves_of(table)
    if any(len(points) > 1 for _, points in curves):
        made["curves.png"] = _learning_curves(table, curves)
    rows = [row for row in table.groups[0].rows if row.dials or row.varies] if table.groups else []
    known = [key for key in keys_shown(table)[0] if all(key in row.varies for row in rows)]
    varying = [key for key in known if len({_key(row.varies[key]) for row in rows}) > 1]
    dials = [_dial(key, rows) for key in varying[:8]]  # as many axes can be read, and plots be looked at
    if len(rows) > 1 and dials:
        made["parallel.png"] = _parallel(table, rows, dials)
        for dial in dials:
            name = re.sub(r"[^\w.-]+", "_", f"{table.judge}_against_{dial.key}.png")
            made[name] = _against(table, rows, dial, [other for other in dials if other is not dial])
    return [save(figure, folder / name) for name, figure in made.items()]


@dataclass(frozen=True)
class Dial:
    """What varies, as an axis."""

    key: str
    values: list[Any]  # in the order of the axis
    at: Callable[[Any], float]  # where a value lies; categories at 0, 1, 2, …
    ticks: list[Any]  # values that are marked
    is_log: bool

    def share(self, value: object) -> float:
        """How far along the axis a value lies, from 0 to 1."""
        low, high, place = map(self.at, (self.values[0], self.values[-1], value))
        if self.is_log:
            low, high, place = map(math.log10, (low, high, place))
        return 0.5 if high == low else (place - low) / (high - low)


def _text(value: object) -> str:
    return shortened(value_text(value), 18)


def _key(value: object) -> float | str:
    return value if isinstance(value, (int, float, str)) else repr(value)


def _dial(key: str, rows: Sequence[Row]) -> Dial:
    values = list({_key(row.varies[key]): row.varies[key] for row in rows}.values())
    if all(type(value) in (int, float) and math.isfinite(value) for value in values):
        values.sort()
        is_log = values[0] > 0 and (key == "lr" or values[-1] >= 8 * values[0])
        every = math.ceil(len(values) / 8)  # at most 8 are marked
        return Dial(key, values, float, values[::every], is_log)
    values.sort(key=lambda value: (value is not None, value_text(value)))
    places = {_key(value): float(place) for place, value in enumerate(values)}
    return Dial(key, values, lambda value: places[_key(value)], values, is_log=False)


def _loss_colours(values: Sequence[float]) -> tuple[ScalarMappable, list[Any]]:
    """From the lowest loss, dark, to the highest: the scale, and the values' colours on it."""
    low, high = min(values), max(values)
    scale = ScalarMappable(Normalize(low, high if high > low else low + 1e-9), colormaps["viridis"])
    return scale, list(scale.to_rgba(np.array(values)))


def _learning_curves(table: Table, curves: Curves) -> Figure:
    """Loss over epochs, step 0 included; a second panel from the first epoch on where step 0 hides the rest.

    Names stand beside the curves' ends, of many only the best one's, moved apart where they would cover each other.
    """
    panels = [curves, *filter(None, [without_step_0(curves)])]
    figure = new_figure(7.5 if len(panels) == 1 else 11.5)
    scale, by_loss = _loss_colours([points[-1][1] for _, points in curves])
    few = len(curves) <= MANY
    colours = dict(zip((row.name for row, _ in curves), COLOURS if few else by_loss, strict=False))
    labels = [(EPOCH, f"{table.curve} (nats per masked token)"), ("epoch (without step 0)", "")]
    for number, (panel, (x, y)) in enumerate(zip(panels, labels, strict=False), start=1):
        axes = styled(figure.add_subplot(1, len(panels), number), x, y)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for row, points in reversed(panel):  # the best on top, those that have not finished dotted
            width = 2.4 if table.standing(row) == "best" else 1.5 if few else 1.0
            style, marker, colour = "-" if row.status == "FINISHED" else ":", "o" if few else None, colours[row.name]
            axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=width, marker=marker, markersize=3.5)
    low, high = axes.get_ylim()
    named = [(row, points[-1]) for row, points in panel if few or table.standing(row) == "best"]
    named.sort(key=lambda one: one[1][1])
    place, places = -math.inf, []
    for _, (_, loss) in named:
        place = max((loss - low) / (high - low), place + 0.052)
        places.append(place)
    beyond = max(0.0, place - 1.0)
    for (row, end), share in zip(named, places, strict=True):
        name = shortened(f"{row.name} (best)" if table.standing(row) == "best" else row.name, 28)
        own, at = {"color": colours[row.name]}, (1.03, share - beyond)
        line = {**own, "arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3}
        axes.annotate(name, end, at, textcoords="axes fraction", fontsize=9, va="center", arrowprops=line, **own)
    if not few:
        figure.colorbar(scale, ax=figure.axes, label=f"last {table.curve}", fraction=0.03, pad=0.02)
    return figure


def _parallel(table: Table, rows: Sequence[Row], dials: Sequence[Dial]) -> Figure:
    """A line per run through the values of its dials to its loss, coloured by the loss; the best is thick.

    Lines leave each axis level: those that cross in a point on an axis stay apart beside it.
    """
    losses = [row.value(table.judge) for row in rows]
    scale, colours = _loss_colours(losses)
    low, high = min(losses), max(losses)
    figure = new_figure(max(6.0, 2.1 * (len(dials) + 1) + 1.5), 4.8)
    axes, t = figure.add_subplot(), np.linspace(0, 1, 25)
    xs = np.concatenate([place + t for place in range(len(dials))])
    for row, loss, colour in reversed(list(zip(rows, losses, colours, strict=True))):
        shares = [dial.share(row.varies[dial.key]) for dial in dials]
        shares.append((loss - low) / (high - low) if high > low else 0.5)
        ys = [one + (other - one) * (3 * t**2 - 2 * t**3) for one, other in itertools.pairwise(shares)]
        best = row is table.groups[0].best
        style = {"linewidth": 3.2, "zorder": 4} if best else {"linewidth": 1.4, "alpha": 0.75, "zorder": 3}
        axes.plot(xs, np.concatenate(ys), color=colour, **style)  # type: ignore[arg-type]
    marks = [[(dial.share(value), _text(value)) for value in dial.ticks] for dial in dials]
    marks.append([(share, f"{low + share * (high - low):.4f}") for share in (0, 0.25, 0.5, 0.75, 1)])
    for place, own in enumerate(marks):
        axes.vlines(place, 0, 1, color=INK, linewidth=1.2, zorder=5)
        last = -1.0
        for share, text in own:
            if share - last >= 0.04:  # else it would cover the one before
                last = share
                axes.hlines(share, place - 0.015, place + 0.015, color=INK, linewidth=1.2, zorder=5)
                box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}  # does not hide lines behind
                axes.text(place + 0.04, share, text, fontsize=9, va="center", zorder=6, bbox=box)
    axes.set_xticks(range(len(dials) + 1), [*(shortened(dial.key, 22) for dial in dials), table.judge])
    axes.tick_params(axis="x", length=0, labelsize=10, pad=8)
    axes.set_yticks([])
    axes.set(xlim=(-0.15, len(dials) + 0.45), ylim=(-0.04, 1.04))
    axes.spines[:].set_visible(False)
    figure.colorbar(scale, ax=axes, label=table.judge, fraction=0.04, pad=0.02)
    return figure


def _against(table: Table, rows: Sequence[Row], dial: Dial, others: Sequence[Dial]) -> Figure:
    """The loss at each value of a dial with its interval; runs that differ in nothing else are joined."""
    figure = new_figure()
    axes = styled(figure.add_subplot(), dial.key, table.judge)
    # Where every run has a value of its own, as in a search, a colour for each would tell nothing.
    coloured = next((other for other in others if len(other.values) <= min(MANY, len(rows) - 1)), None)
    keys = [_key(value) for value in coloured.values] if coloured else []
    joined: dict[str, list[Row]] = {}
    for row in rows:
        joined.setdefault(repr([_key(row.varies[other.key]) for other in others]), []).append(row)
    for alike in joined.values():
        alike.sort(key=lambda row: dial.at(row.varies[dial.key]))
        xs = [dial.at(row.varies[dial.key]) for row in alike]
        ys = [row.value(table.judge) for row in alike]
        colour = COLOURS[keys.index(_key(alike[0].varies[coloured.key]))] if coloured else COLOURS[0]
        axes.plot(xs, ys, "-o", color=colour, linewidth=1.3, markersize=5, alpha=0.9)
    best = table.groups[0].best
    base = best.value(table.judge)
    told = [(row, table.differences[row.name]) for row in rows if row.name in table.differences]
    if told and table.judge == YARDSTICK:
        # On the run's point hangs the interval of its difference to the best: runs are told apart by that, and not by
        # the much wider intervals of each loss alone.
        ends = [(dial.at(row.varies[dial.key]), base + found.low, base + found.high) for row, found in told]
        label = "95 % of the difference\nto the best"
        axes.vlines(*zip(*ends, strict=True), color=GREY, linewidth=1.2, zorder=1, label=label)
    x = dial.at(best.varies[dial.key])
    axes.plot(x, base, "o", markersize=12, markerfacecolor="none", markeredgecolor=INK, label="best")
    if coloured is not None:
        for colour, value in zip(COLOURS, coloured.values, strict=False):
            axes.plot([], [], "-o", color=colour, markersize=5, label=f"{coloured.key} {_text(value)}")
    if dial.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    ticks, texts = [dial.at(value) for value in dial.ticks], [_text(value) for value in dial.ticks]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    marks = sorted(zip(map(dial.share, dial.ticks), map(len, texts), strict=True))
    crowded = any(
        (right - left) * 60 < (one + other) / 2  # as many characters stand side by side below an axis
        for (left, one), (right, other) in itertools.pairwise(marks)
    )
    axes.set_xticks(ticks, texts, rotation=25 if crowded else 0, ha="right" if crowded else "center")
    axes.margins(x=0.08)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure
