"""Learning curves as text: braille dots, two by four in a character."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mlmx.comparison.ranking import Table
from mlmx.comparison.rows import Points, Row

WIDTH, HEIGHT = 60, 12  # characters
Curves = list[tuple[Row, Points]]
CLOSE = 0.6  # of all heights those after step 0, below which they are drawn alone
NAMED = 6  # curves that are called by name at their end
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # by column, then row from the top
BLANK = 0x2800
LONGEST_NAME = 24


def plain_curves(table: Table, width: int = WIDTH, height: int = HEIGHT) -> str:
    """The loss of every run over epochs, step 0 included; the best ones are named where they end.

    Empty where no run has two points.
    """
    drawn = [(row, points) for row, points in curves_of(table) if len(points) > 1]
    if not drawn:
        return ""
    title = f"{table.curve} over epochs"
    if later := without_step_0(drawn):
        before = [points[0][1] for _, points in drawn]
        title = f"{title}, after {_between(min(before), max(before))} before training"
        drawn = later
    every = [point for _, points in drawn for point in points]
    (left, right), (bottom, top) = (_range([point[axis] for point in every]) for axis in (0, 1))
    cells = [[BLANK] * width for _ in range(height)]
    for _, points in drawn:
        places = [
            ((x - left) / (right - left) * (2 * width - 1), (top - y) / (top - bottom) * (4 * height - 1))
            for x, y in points
        ]
        _draw(cells, places)
    lines = ["".join(map(chr, line)) for line in cells]
    names = _at_their_end(drawn, bottom, top, height)
    digits = max(0, 1 - math.floor(math.log10(top - bottom)))
    labels = [f"{top:.{digits}f}", *[""] * (height - 2), f"{bottom:.{digits}f}"]
    margin = max(map(len, labels))
    rows = [
        f"{label:>{margin}} ┤{line} {name}".rstrip() for label, line, name in zip(labels, lines, names, strict=True)
    ]
    axis = f"{'':>{margin}} └{'─' * width}"
    ends = f"{'':>{margin}}  {left:<{width // 2}g}{right:>{width - width // 2}g}"
    return "\n".join([title, *rows, axis, ends])


def curves_of(table: Table) -> Curves:
    """The finite points of the runs whose curves may be drawn together, where there are any."""
    curves = [(row, row.curves.get(table.curve, [])) for row in table.alike]
    finite = [(row, [point for point in points if all(map(math.isfinite, point))]) for row, points in curves]
    return [(row, points) for row, points in finite if points]


def without_step_0(curves: Curves) -> Curves:
    """From the first epoch on, where what the runs began with would hide how they differ; else none."""
    later = [(row, points[1:]) for row, points in curves if len(points) > 2]
    return later if later and _spread(later) < CLOSE * _spread(curves) else []


def _spread(curves: Curves) -> float:
    heights = [y for _, points in curves for _, y in points]
    return max(heights) - min(heights)


def _between(low: float, high: float) -> str:
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} … {high:.4g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _draw(cells: list[list[int]], places: Points) -> None:
    """Dots along the lines between places (column, row), counted in dots from the top left."""
    for (x, y), (next_x, next_y) in itertools.pairwise(places):
        steps = max(1, math.ceil(max(abs(next_x - x), abs(next_y - y))))
        for step in range(steps + 1):
            column = round(x + (next_x - x) * step / steps)
            row = round(y + (next_y - y) * step / steps)
            cells[row // 4][column // 2] |= DOTS[column % 2][row % 4]


def _at_their_end(drawn: Curves, bottom: float, top: float, height: int) -> list[str]:
    """For each line of the chart the names of the curves that end there, as far as they are among the best."""
    found: list[list[str]] = [[] for _ in range(height)]
    for row, points in drawn[:NAMED]:
        place = round((top - points[-1][1]) / (top - bottom) * (4 * height - 1)) // 4
        found[place].append(row.name[:LONGEST_NAME])
    return [", ".join(names) for names in found]
