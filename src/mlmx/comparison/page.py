"""The comparison as one HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mlmx.comparison.plots import DPI
from mlmx.comparison.ranking import Table
from mlmx.comparison.text import columns, group_title, parts_of, remarks


def report(table: Table, title: str, charts: Sequence[Path] = ()) -> str:
    """One HTML page that needs no other file: the table, what is to be said of it, and PNG files that `plots` made."""
    loader, strict = FileSystemLoader(Path(__file__).parent), StrictUndefined
    page = Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("page.html.j2").render(
        title=title,
        table=table,
        columns=columns(table),
        parts=parts_of(table),
        remarks=remarks(table),
        charts=[_chart(path) for path in charts],
        drawn=group_title(table, table.groups[0]) if len(table.groups) > 1 else None,
    )


def _chart(path: Path) -> dict[str, str | int]:
    contents = path.read_bytes()
    return {
        "name": path.stem.replace("_against_", " against ").replace("heldout_", "heldout/"),
        "width": int.from_bytes(contents[16:20]) * 96 // DPI,  # as the PNG's header says, in the page's pixels
        "base64": base64.b64encode(contents).decode(),
    }
