"""Learning curves as text: braille dots, two by four in a character."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mlmx.comparison.ranking import Table
from mlmx.comparison.rows import Points, Row

Curves = list[tuple[Row, Points]]
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # by column, then row from the top


def plain_curves(table: Table, width: int = 60, height: int = 12) -> str:
    """The loss of every run over epochs, step 0 included, in so many characters; the best are named where they end.

    Empty where no run has two points.
    """
    drawn = [(row, points) for row, points in curves_of(table) if len(points) > 1]
    if not drawn:
        return ""
    title = f"{table.curve} over epochs"
    if later := without_step_0(drawn):
        before = [points[0][1] for _, points in drawn]
        low, high = f"{min(before):.4g}", f"{max(before):.4g}"
        title += f", after {low if low == high else f'{low} … {high}'} before training"
        drawn = later
    (left, right), (bottom, top) = (_range([point[axis] for _, points in drawn for point in points]) for axis in (0, 1))
    cells = [[0x2800] * width for _ in range(height)]
    names: list[list[str]] = [[] for _ in range(height)]
    for number, (row, points) in enumerate(drawn):
        # In dots from the top left, along the lines between the points.
        xs = [(x - left) / (right - left) * (2 * width - 1) for x, _ in points]
        ys = [(top - y) / (top - bottom) * (4 * height - 1) for _, y in points]
        for (x, y), (next_x, next_y) in itertools.pairwise(zip(xs, ys, strict=True)):
            steps = max(1, math.ceil(max(abs(next_x - x), abs(next_y - y))))
            for step in range(steps + 1):
                across, down = round(x + (next_x - x) * step / steps), round(y + (next_y - y) * step / steps)
                cells[down // 4][across // 2] |= DOTS[across % 2][down % 4]
        if number < 6:  # the best ones
            names[round(ys[-1]) // 4].append(row.name[:24])
    digits = max(0, 1 - math.floor(math.log10(top - bottom)))
    labels = [f"{top:.{digits}f}", *[""] * (height - 2), f"{bottom:.{digits}f}"]
    margin = max(map(len, labels))
    lines = [title]
    for label, line, ending in zip(labels, cells, names, strict=True):
        lines.append(f"{label:>{margin}} ┤{''.join(map(chr, line))} {', '.join(ending)}".rstrip())
    lines.append(f"{'':>{margin}} └{'─' * width}")
    lines.append(f"{'':>{margin}}  {left:<{width // 2}g}{right:>{width - width // 2}g}")
    return "\n".join(lines)


def curves_of(table: Table) -> Curves:
    """The finite points of the runs whose curves may be drawn together, where there are any."""
    drawn = [(row, row.curves.get(table.curve, [])) for row in table.alike]
    finite = [(row, [point for point in points if all(map(math.isfinite, point))]) for row, points in drawn]
    return [(row, points) for row, points in finite if points]


def without_step_0(curves: Curves) -> Curves:
    """From the first epoch on, where what the runs began with would hide how they differ: in less than 0.6 of all
    heights. Else none."""
    later = [(row, points[1:]) for row, points in curves if len(points) > 2]
    some, every = ([y for _, points in those for _, y in points] for those in (later, curves))
    return later if later and max(some) - min(some) < 0.6 * (max(every) - min(every)) else []


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
