"""Charts of several runs: one per dial that varies, for any number and state of runs; a page that stands alone."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mlmx.comparison import plots
from mlmx.comparison.curves import plain_curves
from mlmx.comparison.page import report
from mlmx.comparison.ranking import Table, tabulate
from tests.support.made_runs import made


def grid(folder: Path, number: int, **fixed: Any) -> Table:
    """That many runs of a grid of a learning rate, a chunk size and a masking."""
    values = itertools.product([1e-5, 3e-5, 1e-4, 3e-4, 1e-3], [64, 128, 256], ["token", "span"])
    runs = []
    for place, (lr, size, masking) in enumerate(itertools.islice(values, number)):
        dials = {"lr": lr, "chunk_size": size, "masking.name": masking}
        runs.append(made(folder / str(place), dials, loss=2.5 + 0.01 * place, **fixed))
    return tabulate(runs)


@pytest.mark.parametrize("number", [2, 6, 30])
def test_a_chart_per_dial_that_varies_and_the_curves(number: int, tmp_path: Path):
    table = grid(tmp_path / "runs", number)
    files = plots.draw(table, tmp_path / "charts")
    against = {f"heldout_loss_against_{key}.png" for key in table.keys}
    assert {path.name for path in files} == {"curves.png", "parallel.png"} | against
    assert len(against) == {2: 1, 6: 2, 30: 3}[number]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files)


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path):
    assert plots.draw(tabulate([]), tmp_path / "none") == []
    assert plots.draw(tabulate([made(tmp_path / "f", status="FAILED")]), tmp_path / "failed") == []
    alone = plots.draw(tabulate([made(tmp_path / "a")]), tmp_path / "alone")
    assert [path.name for path in alone] == ["curves.png"]
    alike = [made(tmp_path / name, loss=2.5) for name in ("b", "c")]
    assert [path.name for path in plots.draw(tabulate(alike), tmp_path / "alike")] == ["curves.png"]


STRANGE = ["$\\frac{", "a/../b", "x" * 300, "<b>", "ünï → 😀"]


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning")  # no font has every character
def test_any_value_and_any_name_can_be_drawn(tmp_path: Path):
    runs = [
        made(
            tmp_path / str(place),
            {"model.path": value, "run_name": value, "lr": lr},
            loss=2 + place / 10,
            epochs=epochs,
        )
        for place, (value, lr, epochs) in enumerate(
            zip(
                [*STRANGE, None, True, [1, 2]],
                [1e-5, 0, -1, 1e30, 2, 3, 4, "x"],
                [0, 1, 2, 3, 1, 1, 2, 30],
                strict=True,
            )
        )
    ]
    table = tabulate(runs, keys=["model.path", "lr", "a key/with $ signs"])
    files = plots.draw(table, tmp_path / "charts")
    assert [path.name for path in files] == [
        "curves.png",
        "parallel.png",
        "heldout_loss_against_model.path.png",
        "heldout_loss_against_lr.png",
    ]
    assert {path.parent for path in files} == {tmp_path / "charts"}


def test_only_runs_that_may_be_ranked_together_share_a_chart(tmp_path: Path):
    other = {"protocol": "heldout-ffffffffffff", "parts": {"documents": "d2"}}
    runs = [made(tmp_path / str(n), {"lr": 1e-5 * (n + 1)}, loss=2.5 + n) for n in range(3)]
    table = tabulate([*runs, made(tmp_path / "x", {"lr": 1.0}, loss=0.1, **other)])
    drawn: list[list[str]] = []

    def parallel(table: Table, rows: Any, dials: Any) -> Any:
        drawn.append([row.name for row in rows])
        return plots._figure(2, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_parallel", parallel)
        files = plots.draw(table, tmp_path / "charts")
    assert drawn == [["0", "1", "2"]]
    assert [row.name for row in table.alike] == ["0", "1", "2"]
    assert " x" not in plain_curves(table)
    assert "show the largest group only" in report(table, "t", files)


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains of what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_names_as_text(tmp_path: Path):
    runs = [made(tmp_path / "a", {"run_name": "<script>alert(1)</script>", "lr": 1.0}), made(tmp_path / "b", loss=2.6)]
    table = tabulate(runs)
    text = report(table, "Runs of <b>", plots.draw(table, tmp_path / "charts"))
    page = Page(text)
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert re.search(r'<tr class="best"><td class="text">&lt;script', text)
    assert Page(report(tabulate([]), "nothing")).sources == []


def test_values_that_lie_close_do_not_hide_each_other(tmp_path: Path):
    """As a search draws them: each run has its own of everything."""
    values = [(0.118823, 8.6e-4), (0.146798, 2.1e-5), (0.279598, 2.9e-4), (0.385214, 5.6e-5)]
    dials = [{"mlm_probability": rate, "lr": lr} for rate, lr in values]
    table = tabulate([made(tmp_path / str(place), one, loss=2.5 + place) for place, one in enumerate(dials)])
    rows = table.groups[0].rows
    rate, lr = (plots._dial(key, rows) for key in ("mlm_probability", "lr"))
    figure = plots._against(table, rows, rate, [lr])
    [axes] = figure.axes
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {25.0}
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts() if "lr" in text.get_text()] == [], "a colour for each run"


def test_no_state_of_matplotlib_is_touched(tmp_path: Path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.draw(grid(tmp_path / "runs", 2), tmp_path / "charts")
    assert dict(mpl.rcParams) == before
