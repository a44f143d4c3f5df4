"""The comparison as one HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from mlmx.comparison.plots import DPI
from mlmx.comparison.ranking import Table
from mlmx.comparison.rows import Row
from mlmx.comparison.text import cells, group_title, headings, is_text, parts_of, remarks

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.87rem; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #999; } .text { text-align: left; }
.best td { font-weight: 600; background: #eef6ee; } .unranked td { color: #777; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #666; font-size: 0.87rem; }
"""


def report(table: Table, title: str, charts: Sequence[Path] = ()) -> str:
    """One HTML page that needs no other file: the table, what is to be said of it, and the charts.

    Args:
        charts: PNG files, as `draw` makes them.
    """
    blocks = [f"<h2>{html.escape(part)}</h2>{_html_table(table, rows)}" if part else _html_table(table, rows)
              for part, rows in parts_of(table)]  # fmt: skip
    notes = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks(table))
    figures = "".join(_html_figure(path) for path in charts)
    if len(table.groups) > 1 and charts:
        drawn = html.escape(group_title(table, table.groups[0]))
        figures = f"<p>The charts show the largest group only: {drawn}.</p>{figures}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        f"<h1>{html.escape(title)}</h1>\n{''.join(blocks)}\n<ul>{notes}</ul>\n{figures}\n</body>\n</html>\n"
    )


def _html_table(table: Table, rows: Sequence[Row]) -> str:
    names = headings(table)
    kinds = [' class="text"' if is_text(table, name) else "" for name in names]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(names, kinds, strict=True))
    lines, unranked = [], {row.name for row in table.unranked}
    for row in rows:
        of = "best" if table.is_best(row) else "unranked" if row.name in unranked else ""
        values = zip(cells(table, row), kinds, strict=True)
        lines.append(
            f'<tr class="{of}">' + "".join(f"<td{kind}>{html.escape(text)}</td>" for text, kind in values) + "</tr>"
        )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _html_figure(path: Path) -> str:
    name = html.escape(path.stem.replace("_against_", " against ").replace("heldout_", "heldout/"))
    contents = path.read_bytes()
    width = int.from_bytes(contents[16:20]) * 96 // DPI  # as the PNG's header says, in the page's pixels
    image = f'<img alt="{name}" width="{width}" src="data:image/png;base64,{base64.b64encode(contents).decode()}">'
    return f"<figure><figcaption>{name}</figcaption>{image}</figure>\n"
