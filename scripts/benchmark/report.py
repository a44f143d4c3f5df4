"""A run's readings as JSON, as Markdown, and in ``docs/performance.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.rows import COMPARISONS, Reading, Row
from benchmark.workers import SIDES

HEADINGS = {"chunk_size": "chunk size", "batch_size": "batch size, short chunks", "reviews": "reviews in the corpus"}


def row_record(row: Row, reading: Reading) -> dict[str, Any]:
    """One line of the table with all that was measured for it."""
    stock, mlmx = reading.value("stock"), reading.value("mlmx")
    goal = row.goal
    value = COMPARISONS[goal.compared](stock, mlmx)
    holds = all(reading.holds.values())
    return {
        "what": row.what,
        "unit": row.unit,
        "stock": stock,
        "mlmx": mlmx,
        "compared": goal.compared,
        "value": value,
        "must": bound(goal.sign, goal.must),
        "aim": bound(goal.sign, goal.aim),
        "met": goal.reached(value, goal.must) and holds,
        "at_peak": reading.at_peak,
        "within_peak": reading.at_peak is None or goal.reached(reading.at_peak, goal.must),
        "aim_met": goal.aim is not None and goal.reached(value, goal.aim) and holds,
        "holds": reading.holds,
        "samples": reading.samples,
        "notes": reading.notes,
    }


def bound(sign: str, number: float | None) -> str:
    return "–" if number is None else f"{sign} {number:g}"


def markdown(run: Mapping[str, Any]) -> str:
    """The whole run as Markdown: machine, table, growth."""
    parts = [machine_lines(run), table(run["rows"])]
    if run["growth"]:
        parts.append(growth_tables(run["growth"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def machine_lines(run: Mapping[str, Any]) -> str:
    machine, settings = run["machine"], run["settings"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    processor = f"{machine['usable cores']} × {machine['processor']} ({' '.join(machine['flags'])})"
    load = f"load {machine['load before the run']:g} before the run"
    form = "quick form: the figures mean nothing" if settings["quick"] else f"medians of {settings['repeats']} or more"
    lines = [
        f"{processor}, {machine['memory in GB']:g} GB, {machine['system']}, {load}",
        f"Python {machine['python']}, {packages}; mlmx at {machine['commit']}",
        f"device {settings['device']}, {form}",
    ]
    for side in SIDES:
        own = machine["sides"][side]
        lines.append(f"{side}: " + ", ".join(f"{name} {shown(value)}" for name, value in own.items()))
    return "\n".join(f"- {line}" for line in lines)


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={inner}" for name, inner in value.items()) or "as it is"
    return str(value)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the rows that were measured."""
    if not rows:
        return ""
    lines = [
        "| row | what | stock | mlmx | compared | must | aim | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| `{name}` | {row['what']} | failed: {row['error'].splitlines()[-1][:120]} | | | | | no |")
            continue
        met = "aim" if row["aim_met"] else "yes" if row["met"] else "no"
        if row["must"] == "–":
            met = "–"
        if not row["met"] and not row["within_peak"]:
            met += f" ({number(row['at_peak'])} at 100 % of the GEMM peak)"
        figures = [f"{number(row[side])} {row['unit']}" for side in SIDES]
        compared = f"{row['compared']} = {number(row['value'])}"
        lines.append(
            f"| `{name}` | {row['what']} | {' | '.join(figures)} | {compared} | {row['must']} | {row['aim']} | {met} |"
        )
        lines[-1] += "".join(f" (not so: {what})" for what, held in row["holds"].items() if not held)
    return "\n".join(lines)


def growth_tables(found: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """A table for each thing that was varied."""
    parts = []
    for varied, points in found.items():
        units = list(points[0]["stock"])
        heads = [HEADINGS[varied], *(f"{side}, {unit}" for unit in units for side in SIDES)]
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for point in points:
            cells = [f"{point[varied]:,}", *(number(point[side][unit]) for unit in units for side in SIDES)]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def number(value: float) -> str:
    """Three digits that count: ``1,234`` ``17.2`` ``0.0512``."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_docs(path: Path, run: Mapping[str, Any]) -> None:
    """Put the tables of a run between the markers of a document; what was not measured stays as it is."""
    text = path.read_text(encoding="utf-8")
    if run["rows"]:
        text = between(text, "table", machine_lines(run) + "\n\n" + table(run["rows"]))
    if run["growth"]:
        text = between(text, "growth", growth_tables(run["growth"]))
    path.write_text(text, encoding="utf-8")


def between(text: str, name: str, content: str) -> str:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)
