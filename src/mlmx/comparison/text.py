"""A table as text: Markdown, CSV, plain lines, and rich's for a terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mlmx.comparison.ranking import ACROSS_TOKENIZERS, OWN, YARDSTICK, Group, Table
from mlmx.comparison.rows import Row, shown

if TYPE_CHECKING:
    import rich.table

USUAL = ("heldout/loss", "heldout/perplexity", "eval/perplexity", "train/tokens_per_second", "minutes")
HEADINGS = {"train/tokens_per_second": "tokens/s"}
INTERVAL, DIFFERENCE = "95 %", "vs best [95 %]"
NOTHING = "–"
WORTH_LEAST = ("eval/perplexity", INTERVAL, "minutes", "tokens/s", "heldout/perplexity")  # where there is no space
UNLIMITED = 10**9  # characters of a line
SAME = "≈"
EXPLAINED = (
    "95 %: over held-out documents. vs best: the paired difference in heldout/loss; "
    f"{SAME} where its interval includes 0, so that these documents do not tell the two apart"
)


def keys_shown(table: Table) -> tuple[list[str], dict[str, str]]:
    """The keys that get a column, and those that follow from one of their group that does, by that one.

    ``model.path`` tells ``model.revision`` where every path has one revision.
    """
    kept: list[str] = []
    following: dict[str, str] = {}
    rows = [row for row in table.rows if row.dials]
    for key in sorted(table.keys, key=lambda key: not key.endswith((".path", ".source"))):
        group = key.partition(".")[0]
        for leader in [one for one in kept if "." in one and one.partition(".")[0] == group]:
            pairs = {(str(row.varies.get(leader)), str(row.varies.get(key))) for row in rows}
            if len(pairs) == len({value for value, _ in pairs}):
                following[key] = leader
                break
        else:
            kept.append(key)
    return [key for key in table.keys if key in kept], following


@dataclass(frozen=True)
class Column:
    """A column of the table: what stands in it for a run; words stand left, numbers right."""

    name: str
    text: Callable[[Row], str]
    is_words: bool = False


def columns(table: Table) -> list[Column]:
    """The columns, all of them."""

    def dial(key: str, row: Row) -> str:
        return value_text(row.varies[key]) if key in row.varies else NOTHING

    def metric(name: str, row: Row) -> str:
        return number_text(row.metrics.get(name), name)

    def interval(row: Row) -> str:
        return f"{row.interval[0]:.4f} … {row.interval[1]:.4f}" if row.interval else NOTHING

    def difference(row: Row) -> str:
        """``+0.0067 [+0.0012, +0.0120]``, with a sign where that does not tell the two apart."""
        if table.standing(row) == "best":
            return "*"
        if (found := table.differences.get(row.name)) is None:
            return NOTHING
        sign = "" if found.is_told_apart else f"{SAME} "
        return f"{sign}{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"

    def status(row: Row) -> str:
        ended_early = "pruned" if row.pruned else "resumable" if row.resumable and row.status != "FINISHED" else ""
        return f"{row.status}, {ended_early}" if ended_early else str(row.status)

    found = [Column("run", lambda row: row.name, is_words=True)]
    found += [Column(shown(key), partial(dial, key), is_words=True) for key in keys_shown(table)[0]]
    # The usual metrics of which there is any, before them what rows are sorted and judged by.
    there = {name for row in table.rows for name in row.metrics}
    extra = [name for name in dict.fromkeys((table.sort, table.judge)) if name not in USUAL]
    for name in [name for name in (*extra, *USUAL) if name in there]:
        found.append(Column(shown(HEADINGS.get(name, name)), partial(metric, name)))
        if name == YARDSTICK:
            found += [Column(INTERVAL, interval)] if any(row.interval for row in table.rows) else []
            found += [Column(DIFFERENCE, difference, is_words=True)] if table.differences else []
    return [*found, Column("status", status, is_words=True)]


def value_text(value: object) -> str:
    """A dial's value; of a long one the middle is left out."""
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else shortened(shown(str(value)), 32)


def shortened(text: str, longest: int) -> str:
    """A text without its middle where it is too long."""
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-(longest // 2) :]}"


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


def group_title(table: Table, group: Group) -> str:
    """What the runs of a group were measured on."""
    if table.judge == OWN:
        return "the same validation chunks and masks"
    number, source = group.parts.get("number"), group.parts.get("source")
    what = f"{number:,} documents of {source}" if isinstance(number, int) else ""
    name = group.key if group.key.startswith("heldout-") else ""
    return shown(": ".join(filter(None, [name, what])) or "held-out documents")


def remarks(table: Table) -> list[str]:
    """What a reader has to know beside the table, a sentence each."""
    said = [table.refusal] if table.refusal else []
    for group in [group for group in table.groups if len(group.rows) > 1]:
        best, others = group.best, [row.name for row in group.rows if row.name in table.differences]
        close = [name for name in others if not table.differences[name].is_told_apart]
        told = f"best by {table.judge}: {best.name} ({number_text(best.value(table.judge), table.judge)})"
        if len(table.groups) > 1:
            told += f" of {group_title(table, group)}"
        if close:
            told += f"; not told apart from it: {', '.join(close[:8])}"
            told += f" and {len(close) - 8} more" if len(close) > 8 else ""
        said.append(told)
    if table.differences:
        said.append(EXPLAINED)
    if table.judge == OWN and table.groups:
        said.append("nothing was held out: eval/loss ranks only runs of the same validation chunks and masks")
    if not table.groups and table.rows:
        said.append("no run has finished with a loss, so none is the best")
    following = keys_shown(table)[1]
    for leader in dict.fromkeys(following.values()):
        keys = [key for key in following if following[key] == leader]
        said.append(f"with {leader} differ: {', '.join(keys)}")
    said += [f"{row.name}: {row.note}" for row in table.rows if row.note]
    return [shown(remark) for remark in said]


def parts_of(table: Table) -> list[tuple[str, list[Row]]]:
    """The table's parts with their titles; one part has none."""
    parts = [(group_title(table, group), group.rows) for group in table.groups]
    if table.unranked:
        parts.append(("not ranked", table.unranked))
    return parts if len(parts) > 1 else [("", rows) for _, rows in parts]


def markdown(table: Table) -> str:
    """A Markdown table per group, and the remarks."""
    across = columns(table)
    blocks = []
    for title, rows in parts_of(table):
        lines = [[_escaped(column.name) for column in across]]
        lines.append(["---" if column.is_words else "---:" for column in across])
        for row in rows:
            first, *others = (_escaped(column.text(row)) for column in across)
            lines.append([f"**{first}**" if table.standing(row) == "best" else first, *others])
        head = f"**{_escaped(title)}**\n\n" if title else ""
        blocks.append(head + "\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    if said := remarks(table):
        blocks.append("\n".join(f"- {_escaped(remark)}" for remark in said))
    return "\n\n".join(blocks) + "\n"


def _escaped(text: str) -> str:
    return text.translate({ord(sign): f"\\{sign}" for sign in "\\|*_`[]"} | {ord("<"): "&lt;"})


def csv_text(table: Table) -> str:
    """Every run with all keys that vary and all its metrics, numbers in full."""
    first, there = (*USUAL, ACROSS_TOKENIZERS), {name for row in table.rows for name in row.metrics}
    names = sorted(there, key=lambda name: (name not in first, name))
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


def plain(table: Table) -> str:
    """Aligned lines for a log or a pipe, however long, the remarks below."""
    from rich.console import Console

    drawn = _drawn(table, columns(table), labelled=False)
    drawn.box, drawn.padding = None, (0, 2, 0, 0)
    rendered = Console(width=UNLIMITED).render_lines(drawn, pad=False)
    head, *lines = ("".join(segment.text for segment in line).rstrip() for line in rendered)
    blocks = []
    for title, rows in parts_of(table):
        blocks.append("\n".join([*([title] if title else []), head, *lines[: len(rows)]]))
        del lines[: len(rows)]
    return "\n\n".join(filter(None, [*blocks, "\n".join(remarks(table))]))


def rich_table(table: Table, width: int) -> rich.table.Table:
    """For a terminal: best in bold, groups apart under what they are called, what is not ranked dim; columns that are
    worth least are left out where they do not fit into ``width`` characters."""
    from rich.console import Console

    console, across = Console(width=UNLIMITED), columns(table)
    drawn = _drawn(table, across)
    for least in WORTH_LEAST:
        if console.measure(drawn).maximum <= width:
            break
        across = [column for column in across if column.name != least or least == HEADINGS.get(table.sort, table.sort)]
        drawn = _drawn(table, across)
    return drawn


def _drawn(table: Table, across: Sequence[Column], labelled: bool = True) -> rich.table.Table:
    """Those columns of the table; ``labelled``, a line of its own says what each part is called."""
    import rich.box
    import rich.table
    from rich.text import Text

    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in across:  # folded where there is no space: no digit is cut off
        drawn.add_column(Text(column.name), justify="left" if column.is_words else "right", overflow="fold")
    styles = {"best": "bold green", "ranked": "", "unranked": "dim"}
    for title, rows in parts_of(table):
        if title and labelled:  # the whole of it would widen the first column
            drawn.add_row(Text(title.partition(":")[0], style="italic"))
        for row in rows:
            drawn.add_row(*(Text(column.text(row)) for column in across), style=styles[table.standing(row)])
        drawn.add_section()
    return drawn
