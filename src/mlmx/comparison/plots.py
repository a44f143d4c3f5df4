"""Charts of several runs as PNG, and the page that holds them with their table.

What is drawn is the loss that the table is judged by. Runs that may not be ranked together are not drawn together:
the charts show the largest group.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from mlmx.comparison.ranking import Table
from mlmx.comparison.rows import Row
from mlmx.comparison.text import keys_shown, value_text

DPI = 130
COLOURS = ("#0b6e99", "#b5482a", "#3a7d44", "#7b4ea3", "#c08a1e", "#4a4a4a", "#c2588f", "#2aa198")
LINE_CHARACTERS = 60  # of labels side by side below an axis
MANY = len(COLOURS)  # more curves than these are coloured by their loss, not one by one
MOST_DIALS = 8  # axes of the parallel coordinates, and charts of one dial
MOST_TICKS = 8
LOG_FROM = 8.0  # times from the least to the most from which an axis is logarithmic
GREY, INK = "#b8b8b8", "#333333"


def draw(table: Table, folder: Path) -> list[Path]:
    """``curves.png``, ``parallel.png`` and ``<loss>_against_<dial>.png`` in ``folder``; returns the paths.

    A chart for which there is nothing to draw is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: list[tuple[str, Figure]] = []
    if any(len(points) > 1 for _, points in _curves(table)):
        made.append(("curves.png", _learning_curves(table)))
    rows = [row for row in table.groups[0].rows if row.dials or row.varies] if table.groups else []
    dials = [_dial(key, rows) for key in _keys(table, rows)[:MOST_DIALS]]
    if len(rows) > 1 and dials:
        made.append(("parallel.png", _parallel(table, rows, dials)))
        for dial in dials:
            name = re.sub(r"[^\w.-]+", "_", f"{table.judge}_against_{dial.key}.png")
            made.append((name, _against(table, rows, dial, [other for other in dials if other is not dial])))
    for name, figure in made:
        figure.savefig(folder / name, dpi=DPI, pil_kwargs={"compress_level": 6})
    return [folder / name for name, _ in made]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ------------------------------------------------------------------------------------------ dials


@dataclass(frozen=True)
class Dial:
    """What varies, as an axis.

    Attributes:
        values: its values in the order of the axis.
        at: where a value lies; categories at 0, 1, 2, …
        ticks: values that are marked.
        is_log: whether the axis is logarithmic.
    """

    key: str
    values: list[Any]
    at: Callable[[Any], float]
    ticks: list[Any]
    is_log: bool

    def share(self, value: Any) -> float:
        """How far along the axis a value lies, from 0 to 1."""
        low, high, place = (self._scaled(one) for one in (self.values[0], self.values[-1], value))
        return 0.5 if high == low else (place - low) / (high - low)

    def _scaled(self, value: Any) -> float:
        return math.log10(self.at(value)) if self.is_log else self.at(value)


def _keys(table: Table, rows: Sequence[Row]) -> list[str]:
    """Dials that vary among these rows and are known of all of them."""
    known = [key for key in keys_shown(table)[0] if all(key in row.varies for row in rows)]
    return [key for key in known if len({_key(row.varies[key]) for row in rows}) > 1]


def _key(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else repr(value)


def _dial(key: str, rows: Sequence[Row]) -> Dial:
    values = list({_key(row.varies[key]): row.varies[key] for row in rows}.values())
    if all(type(value) in (int, float) and math.isfinite(value) for value in values):
        values.sort()
        is_log = values[0] > 0 and (key == "lr" or values[-1] >= LOG_FROM * values[0])
        every = math.ceil(len(values) / MOST_TICKS)
        return Dial(key, values, float, values[::every], is_log)
    values.sort(key=lambda value: (value is not None, value_text(value)))
    places = {_key(value): float(place) for place, value in enumerate(values)}
    return Dial(key, values, lambda value: places[_key(value)], values, is_log=False)


def _loss_colours(values: Sequence[float]) -> ScalarMappable:
    """From the lowest loss, dark, to the highest."""
    low, high = min(values), max(values)
    return ScalarMappable(Normalize(low, high if high > low else low + 1e-9), colormaps["viridis"])


def _colour(colours: ScalarMappable, value: float) -> Any:
    return colours.to_rgba(np.array([value]))[0]


def _plain_ticks(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)


# -------------------------------------------------------------------------------- learning curves


def _curves(table: Table) -> list[tuple[Row, list[tuple[float, float]]]]:
    finite = ((row, [(x, y) for x, y in row.curves.get(table.curve, []) if math.isfinite(y)]) for row in table.alike)
    return [(row, points) for row, points in finite if points]


def _learning_curves(table: Table) -> Figure:
    """Loss over epochs, step 0 included; a second panel from the first epoch on where step 0 hides the rest."""
    curves = _curves(table)
    later = [(row, points[1:]) for row, points in curves if len(points) > 2]
    heights = [y for _, points in curves for _, y in points]
    near = [y for _, points in later for _, y in points]
    zoomed = bool(later) and (max(near) - min(near)) < 0.6 * (max(heights) - min(heights))
    figure = _figure(11.5 if zoomed else 7.5, 4.6)
    panels = [curves, later] if zoomed else [curves]
    for number, shown in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        _plain_ticks(axes)
        axes.set_xlabel("epoch (0: before training)" if number == 1 else "epoch (without step 0)")
        axes.set_ylabel(f"{table.curve} (nats per masked token)" if number == 1 else "")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ends = _plot_curves(axes, table, shown)
        if number == len(panels):
            _name_ends(figure, axes, ends)
    if len(curves) > MANY:
        finals = [points[-1][1] for _, points in curves]
        figure.colorbar(_loss_colours(finals), ax=figure.axes, label=f"last {table.curve}", fraction=0.03, pad=0.02)
    return figure


End = tuple[float, float, str, Any]  # (epoch, loss, name, colour)


def _plot_curves(axes: Axes, table: Table, curves: Sequence[tuple[Row, list[tuple[float, float]]]]) -> list[End]:
    """The curves, the best on top; where those that are named end."""
    finals = [points[-1][1] for _, points in _curves(table)]
    by_loss, ends = _loss_colours(finals), []
    for place, (row, points) in reversed(list(enumerate(curves))):
        few = len(curves) <= MANY
        colour = COLOURS[place % MANY] if few else _colour(by_loss, points[-1][1])
        best = table.standing(row) == "best"
        style = "-" if row.status == "FINISHED" else ":"
        width = 2.4 if best else 1.5 if few else 1.0
        marker = "o" if few else None
        axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=width, marker=marker, markersize=3.5)
        if few or best:
            ends.append((*points[-1], f"{row.name} (best)" if best else row.name, colour))
    return ends


def _name_ends(figure: Figure, axes: Axes, ends: Sequence[End]) -> None:
    """Names beside the curves' ends, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    gap, place = 0.052, -math.inf
    ordered = sorted(ends, key=lambda end: end[1])
    places = []
    for _, y, *_ in ordered:
        place = max((y - low) / (high - low), place + gap)
        places.append(place)
    beyond = max(0.0, places[-1] - 1.0) if places else 0.0
    for (x, y, name, colour), share in zip(ordered, places, strict=True):
        axes.annotate(
            _short(name),
            (x, y),
            xytext=(1.03, share - beyond),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
        )
    axes.set_xlim(right=right)


def _short(text: str, longest: int = 28) -> str:
    return text if len(text) <= longest else f"{text[: longest - 12]}…{text[-11:]}"


# --------------------------------------------------------------------------- parallel coordinates


def _parallel(table: Table, rows: Sequence[Row], dials: Sequence[Dial]) -> Figure:
    """A line per run through the values of its dials to its loss, coloured by the loss; the best is thick."""
    losses = [row.value(table.judge) for row in rows]
    colours = _loss_colours(losses)
    low, high = min(losses), max(losses)
    figure = _figure(max(6.0, 2.1 * (len(dials) + 1) + 1.5), 4.8)
    axes = figure.add_subplot()
    for row, loss in reversed(list(zip(rows, losses, strict=True))):
        shares = [dial.share(row.varies[dial.key]) for dial in dials]
        shares.append((loss - low) / (high - low) if high > low else 0.5)
        best = row is table.groups[0].best
        style = {"linewidth": 3.2, "zorder": 4} if best else {"linewidth": 1.4, "alpha": 0.75, "zorder": 3}
        axes.plot(*_smooth(shares), color=_colour(colours, loss), **style)  # type: ignore[arg-type]
    for place, dial in enumerate(dials):
        marks = [(dial.share(value), _short(value_text(value), 18)) for value in dial.ticks]
        _upright(axes, place, marks)
    _upright(axes, len(dials), [(share, f"{low + share * (high - low):.4f}") for share in (0, 0.25, 0.5, 0.75, 1)])
    axes.set_xticks(range(len(dials) + 1), [*(_short(dial.key, 22) for dial in dials), table.judge])
    axes.tick_params(axis="x", length=0, labelsize=10, pad=8)
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(dials) + 0.45)
    axes.set_ylim(-0.04, 1.04)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(colours, ax=axes, label=table.judge, fraction=0.04, pad=0.02)
    return figure


def _smooth(shares: Sequence[float]) -> tuple[list[float], list[float]]:
    """Curves that leave each axis level: lines that cross in a point on an axis stay apart beside it."""
    xs, ys = [0.0], [shares[0]]
    for place, (one, other) in enumerate(itertools.pairwise(shares)):
        for step in range(1, 25):
            t = step / 24
            xs.append(place + t)
            ys.append(one + (other - one) * (3 * t * t - 2 * t**3))
    return xs, ys


def _upright(axes: Axes, place: int, marks: Sequence[tuple[float, str]]) -> None:
    """An axis with its marks, their texts on white so that lines behind them do not hide them."""
    axes.plot([place, place], [0, 1], color=INK, linewidth=1.2, zorder=5)
    last = -1.0
    for share, text in marks:
        if share - last < 0.04:  # would cover the one before
            continue
        last = share
        axes.plot([place - 0.015, place + 0.015], [share, share], color=INK, linewidth=1.2, zorder=5)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        axes.text(place + 0.04, share, text, fontsize=9, va="center", zorder=6, bbox=box, parse_math=False)


# ------------------------------------------------------------------------------- one dial at a time


def _against(table: Table, rows: Sequence[Row], dial: Dial, others: Sequence[Dial]) -> Figure:
    """The loss at each value of a dial with its interval; runs that differ in nothing else are joined."""
    figure = _figure(7.5, 4.6)
    axes = figure.add_subplot()
    _plain_ticks(axes)
    # Where every run has a value of its own, as in a search, a colour for each would tell nothing.
    coloured = next((other for other in others if len(other.values) <= min(MANY, len(rows) - 1)), None)
    for alike in _alike(rows, others):
        alike.sort(key=lambda row: dial.at(row.varies[dial.key]))
        xs = [dial.at(row.varies[dial.key]) for row in alike]
        ys = [row.value(table.judge) for row in alike]
        colour = COLOURS[0]
        if coloured is not None:
            colour = COLOURS[[_key(v) for v in coloured.values].index(_key(alike[0].varies[coloured.key]))]
        axes.plot(xs, ys, "-o", color=colour, linewidth=1.3, markersize=5, alpha=0.9)
    _bars(axes, table, rows, dial)
    best = table.groups[0].best
    place = dial.at(best.varies[dial.key]), best.value(table.judge)
    axes.plot(*place, "o", markersize=12, markerfacecolor="none", markeredgecolor=INK, label="best")
    if coloured is not None:
        for colour, value in zip(COLOURS, coloured.values, strict=False):
            axes.plot([], [], "-o", color=colour, markersize=5, label=f"{coloured.key} {_short(value_text(value), 22)}")
    _along(axes, dial)
    axes.set_xlabel(dial.key, parse_math=False)
    axes.set_ylabel(table.judge)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _alike(rows: Sequence[Row], others: Sequence[Dial]) -> Iterator[list[Row]]:
    """Runs that share the values of all other dials."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(repr([_key(row.varies[other.key]) for other in others]), []).append(row)
    yield from found.values()


def _bars(axes: Axes, table: Table, rows: Sequence[Row], dial: Dial) -> None:
    """Where the difference to the best has an interval, it hangs on the run's point: runs are told apart by that, and
    not by the much wider intervals of each loss alone."""
    best = table.groups[0].best
    for row in rows:
        found = table.differences.get(row.name)
        if found is not None and table.judge == "heldout/loss":
            x, base = dial.at(row.varies[dial.key]), best.value(table.judge)
            axes.plot([x, x], [base + found.low, base + found.high], color=GREY, linewidth=1.2, zorder=1)
    if table.differences and table.judge == "heldout/loss":
        axes.plot([], [], color=GREY, linewidth=1.2, label="95 % of the difference\nto the best")


def _along(axes: Axes, dial: Dial) -> None:
    if dial.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = [dial.at(value) for value in dial.ticks]
    texts = [_short(value_text(value), 18) for value in dial.ticks]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    marks = sorted(zip(map(dial.share, dial.ticks), map(len, texts), strict=True))
    crowded = any(
        (right - left) * LINE_CHARACTERS < (one + other) / 2
        for (left, one), (right, other) in itertools.pairwise(marks)
    )
    axes.set_xticks(ticks, texts, rotation=25 if crowded else 0, ha="right" if crowded else "center", parse_math=False)
    axes.margins(x=0.08)


# ----------------------------------------------------------------------------------------- the page
