"""A table as text: Markdown, CSV, plain lines, and rich's for a terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mlmx.comparison.ranking import Group, Table
from mlmx.comparison.rows import Row, shown

if TYPE_CHECKING:
    import rich.table

METRICS = {
    "heldout/loss": "heldout/loss",
    "heldout/bits_per_byte": "heldout/bits_per_byte",
    "heldout/perplexity": "heldout/perplexity",
    "eval/perplexity": "eval/perplexity",
    "train/tokens_per_second": "tokens/s",
    "minutes": "minutes",
}
INTERVAL, DIFFERENCE = "95 %", "vs best [95 %]"
NOTHING = "–"
UNRANKED = "not ranked"
WORTH_LEAST = ("eval/perplexity", INTERVAL, "minutes", "tokens/s", "heldout/perplexity")  # where there is no space
GAP = 3  # characters between columns
LONGEST = 32  # characters of a value
BEST, SAME = "*", "≈"
EXPLAINED = {
    "loss": "95 %: over held-out documents. vs best: the paired difference in heldout/loss; "
    f"{SAME} where its interval includes 0, so that these documents do not tell the two apart"
}


# ------------------------------------------------------------------------------------------ cells


def metrics_shown(table: Table) -> list[str]:
    """The metrics that get a column: the usual ones of which there is any, and what rows are sorted by."""
    usual = [name for name in METRICS if name != "heldout/bits_per_byte"]
    names = [name for name in usual if any(name in row.metrics for row in table.rows)]
    extra = [name for name in dict.fromkeys((table.sort, table.judge)) if name not in names]
    return [*(name for name in extra if any(name in row.metrics for row in table.rows)), *names]


def keys_shown(table: Table) -> tuple[list[str], dict[str, str]]:
    """The keys that get a column, and those that follow from one of their group that does, by that one.

    ``model.path`` tells ``model.revision`` where every path has one revision.
    """
    kept: list[str] = []
    following: dict[str, str] = {}
    for key in sorted(table.keys, key=lambda key: not key.endswith((".path", ".source"))):
        group = key.partition(".")[0]
        leaders = [one for one in kept if "." in one and one.partition(".")[0] == group and _tells(table, one, key)]
        if leaders:
            following[key] = leaders[0]
        else:
            kept.append(key)
    return [key for key in table.keys if key in kept], following


def _tells(table: Table, leader: str, key: str) -> bool:
    seen: dict[str, str] = {}
    pairs = [(str(row.varies.get(leader)), str(row.varies.get(key))) for row in table.rows if row.dials]
    return all(seen.setdefault(one, other) == other for one, other in pairs)


def headings(table: Table) -> list[str]:
    """The columns' names."""
    return [name for name, _ in _columns(table)]


def cells(table: Table, row: Row) -> list[str]:
    """A row's values, one per heading."""
    return [text(row) for _, text in _columns(table)]


Column = tuple[str, Callable[[Row], str]]


def _columns(table: Table) -> list[Column]:
    found: list[Column] = [("run", lambda row: row.name)]
    found += [(key, partial(_dial_text, key)) for key in keys_shown(table)[0]]
    for name in metrics_shown(table):
        found.append((METRICS.get(name, name), partial(_metric_text, name)))
        if name == "heldout/loss":
            found += [(INTERVAL, _interval_text)] if any(row.interval for row in table.rows) else []
            found += [(DIFFERENCE, partial(difference_text, table))] if table.differences else []
    return [*found, ("status", _status_text)]


def _dial_text(key: str, row: Row) -> str:
    return value_text(row.varies[key]) if key in row.varies else NOTHING


def _metric_text(name: str, row: Row) -> str:
    return number_text(row.metrics.get(name), name)


def _interval_text(row: Row) -> str:
    return f"{row.interval[0]:.4f} … {row.interval[1]:.4f}" if row.interval else NOTHING


def _status_text(row: Row) -> str:
    ended_early = "pruned" if row.pruned else "resumable" if row.resumable and row.status != "FINISHED" else ""
    return ", ".join(filter(None, (row.status, ended_early)))


def value_text(value: Any) -> str:
    """A dial's value; of a long one the middle is left out."""
    if isinstance(value, float):
        text = f"{value:g}"
    elif value is None:
        text = "null"
    else:
        text = shown(str(value))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 1]}…{text[-LONGEST // 2 :]}"


def number_text(value: float | None, metric: str = "") -> str:
    """A metric's value, as many digits as tell runs apart.

    >>> number_text(2.34567, "heldout/loss"), number_text(31186.3, "heldout/perplexity"), number_text(None)
    ('2.3457', '31,186', '–')
    """
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    if metric == "minutes":
        return f"{value:,.1f}"
    if metric.endswith(("loss", "per_byte", "accuracy")):
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def difference_text(table: Table, row: Row) -> str:
    """``+0.0067 [+0.0012, +0.0120]``, with a sign where that does not tell the two apart."""
    found = table.differences.get(row.name)
    if table.is_best(row):
        return BEST
    if found is None:
        return NOTHING
    sign = "" if found.is_told_apart else f"{SAME} "
    return f"{sign}{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


# ---------------------------------------------------------------------------------------- remarks


def group_title(table: Table, group: Group) -> str:
    """What the runs of a group were measured on."""
    number, source = group.parts.get("number"), group.parts.get("source")
    what = f"{number:,} documents of {source}" if isinstance(number, int) else ""
    if table.judge == "eval/loss":
        return "the same validation chunks and masks"
    name = group.key if group.key.startswith("heldout-") else ""
    return shown(f"{name}: {what}" if name and what else name or what or "held-out documents")


def remarks(table: Table) -> list[str]:
    """What a reader has to know beside the table, a sentence each."""
    said = []
    if table.refusal:
        said.append(table.refusal)
    for group in table.groups:
        said += [_winner(table, group)] if len(group.rows) > 1 else []
    if table.differences:
        said.append(EXPLAINED["loss"])
    if table.judge == "eval/loss" and table.groups:
        said.append("nothing was held out: eval/loss ranks only runs of the same validation chunks and masks")
    if not table.groups and table.rows:
        said.append("no run has finished with a loss, so none is the best")
    _kept, following = keys_shown(table)
    by_leader: dict[str, list[str]] = {}
    for key, leader in following.items():
        by_leader.setdefault(leader, []).append(key)
    said += [f"with {leader} differ: {', '.join(keys)}" for leader, keys in by_leader.items()]
    said += [f"{row.name}: {row.note}" for row in table.rows if row.note]
    return said


def _winner(table: Table, group: Group) -> str:
    best = group.best
    told = f"best by {table.judge}: {best.name} ({number_text(best.value(table.judge), table.judge)})"
    where = f" of {group_title(table, group)}" if len(table.groups) > 1 else ""
    close = [row.name for row in group.rows if row.name in table.differences]
    close = [name for name in close if not table.differences[name].is_told_apart]
    listed = ", ".join(close[:8]) + (f" and {len(close) - 8} more" if len(close) > 8 else "")
    return told + where + (f"; not told apart from it: {listed}" if close else "")


# ---------------------------------------------------------------------------------------- formats


def parts_of(table: Table) -> list[tuple[str, list[Row]]]:
    """The table's parts with their titles; one part has none."""
    parts = [(group_title(table, group), group.rows) for group in table.groups]
    if table.unranked:
        parts.append((UNRANKED, table.unranked))
    return parts if len(parts) > 1 else [("", rows) for _, rows in parts]


def markdown(table: Table) -> str:
    """A Markdown table per group, and the remarks."""
    columns = headings(table)
    rule = ["---", *("---" if name in table.keys or name == "status" else "---:" for name in columns[1:])]
    blocks = []
    for title, rows in parts_of(table):
        lines = [_markdown_line(columns), "| " + " | ".join(rule) + " |"]
        lines += [_markdown_line(cells(table, row), bold=table.is_best(row)) for row in rows]
        blocks.append((f"**{_escaped(title)}**\n\n" if title else "") + "\n".join(lines))
    notes = [_escaped(remark) for remark in remarks(table)]
    return "\n\n".join([*blocks, *(["\n".join(f"- {note}" for note in notes)] if notes else [])]) + "\n"


def _markdown_line(values: Sequence[str], bold: bool = False) -> str:
    texts = [_escaped(value) for value in values]
    if bold:
        texts[0] = f"**{texts[0]}**"
    return "| " + " | ".join(texts) + " |"


def _escaped(text: str) -> str:
    for sign in ("\\", "|", "*", "_", "`", "[", "]"):
        text = text.replace(sign, "\\" + sign)
    return text.replace("<", "&lt;")


def csv_text(table: Table) -> str:
    """Every run with all keys that vary and all its metrics, numbers in full."""
    names = sorted({name for row in table.rows for name in row.metrics}, key=lambda name: (name not in METRICS, name))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    own = ["heldout_low", "heldout_high", "difference", "difference_low", "difference_high"]
    writer.writerow(["run", "status", "protocol", *table.keys, *names, *own, "run_id", "title", "folder", "note"])
    for row in table.rows:
        found = table.differences.get(row.name)
        numbers = [*(row.interval or ("", "")), *((found.mean, found.low, found.high) if found else ("", "", ""))]
        varies = [row.varies.get(key, "") for key in table.keys]
        metrics = [row.metrics.get(name, "") for name in names]
        about = [row.run_id or "", row.title, row.run.folder, row.note]
        writer.writerow([row.name, row.status, row.protocol or "", *varies, *metrics, *numbers, *about])
    return out.getvalue()


def plain(table: Table, width: int | None = None) -> str:
    """Aligned lines for a log, the remarks below.

    Args:
        width: characters; columns that are worth least are left out where they do not fit.
    """
    columns = _fitting(table, width)
    lines: list[str] = []
    names = [name for name, _ in columns]
    everything = [names, *([text(row) for _, text in columns] for row in table.rows)]
    widths = [max(len(line[place]) for line in everything) for place in range(len(columns))]

    def aligned(values: Sequence[str]) -> str:
        padded = zip(values, widths, names, strict=True)
        return "  ".join(v.ljust(w) if is_text(table, name) else v.rjust(w) for v, w, name in padded).rstrip()

    for title, rows in parts_of(table):
        lines += ["", title] if title and lines else [title] if title else []
        lines += [aligned(names), *(aligned([text(row) for _, text in columns]) for row in rows)]
    return "\n".join([*lines, *(["", *remarks(table)] if remarks(table) else [])])


def rich_table(table: Table, width: int | None = None) -> rich.table.Table:
    """For a terminal: best in bold, groups apart, what is not ranked dim.

    Args:
        width: characters; columns that are worth least are left out where they do not fit.
    """
    import rich.box
    import rich.table
    from rich.text import Text

    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    labels = [title.partition(":")[0] for title, _ in parts_of(table)]  # a whole title would widen the first column
    columns = _fitting(table, width, labels)
    fits = width is None or _needed(table, columns, labels) <= width  # else folded: no digit is cut off
    for name, _ in columns:
        side: Literal["left", "right"] = "left" if is_text(table, name) else "right"
        drawn.add_column(Text(name), justify=side, overflow="fold", no_wrap=fits and name not in table.keys)
    for label, (title, rows) in zip(labels, parts_of(table), strict=True):
        if label:
            drawn.add_row(Text(label, style="italic"))
        for row in rows:
            best = table.is_best(row)
            style = "bold green" if best else "dim" if title == UNRANKED else ""
            drawn.add_row(*(Text(text(row)) for _, text in columns), style=style)
        drawn.add_section()
    return drawn


def is_text(table: Table, column: str) -> bool:
    """Whether a column holds words, not numbers to be aligned."""
    return column in ("run", "status", DIFFERENCE) or column in table.keys


def _fitting(table: Table, width: int | None, labels: Sequence[str] = ()) -> list[Column]:
    """The columns, but for those that do not fit; ``labels`` stand in the first one as well."""
    columns = _columns(table)
    for least in WORTH_LEAST:
        if width is None or _needed(table, columns, labels) <= width:
            break
        columns = [column for column in columns if column[0] != least or least == table.sort]
    return columns


def _needed(table: Table, columns: Sequence[Column], labels: Sequence[str]) -> int:
    """Characters of a line."""
    widths = [max([len(name), *(len(text(row)) for row in table.rows)]) + GAP for name, text in columns]
    return sum(widths[1:]) + max([widths[0], *(len(label) + GAP for label in labels)])
