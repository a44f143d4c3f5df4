"""Plots of one run, and of several: one per dial that varies, for any number and state; a page that stands alone."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

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
    files = plots.plot_table(table, tmp_path / "charts")
    against = {f"heldout_loss_against_{key}.png" for key in table.keys}
    assert {path.name for path in files} == {"curves.png", "parallel.png"} | against
    assert len(against) == {2: 1, 6: 2, 30: 3}[number]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files)


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path):
    assert plots.plot_table(tabulate([]), tmp_path / "none") == []
    assert plots.plot_table(tabulate([made(tmp_path / "f", status="FAILED")]), tmp_path / "failed") == []
    alone = plots.plot_table(tabulate([made(tmp_path / "a")]), tmp_path / "alone")
    assert [path.name for path in alone] == ["curves.png"]
    alike = [made(tmp_path / name, loss=2.5) for name in ("b", "c")]
    assert [path.name for path in plots.plot_table(tabulate(alike), tmp_path / "alike")] == ["curves.png"]


STRANGE = ["$\\frac{$", "a/../b", "x" * 300, "<b>", "ünï → 😀"]


def test_what_stands_in_legends_and_on_axes_is_no_formula(tmp_path: Path):
    given = enumerate(itertools.product(["$\\frac{$", "b"], [1e-5, 1e-4]))
    runs = [made(tmp_path / f"{n}$", {"$^$": n % 2, "model.path": path, "lr": lr}) for n, (path, lr) in given]
    assert len(plots.plot_table(tabulate(runs), tmp_path / "charts")) == 5


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
    files = plots.plot_table(table, tmp_path / "charts")
    assert [path.name for path in files] == [
        "curves.png",
        "parallel.png",
        "heldout_loss_against_model.path.png",
        "heldout_loss_against_lr.png",
    ]
    assert {path.parent for path in files} == {tmp_path / "charts"}


def figures_of(table: Table, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures behind the files."""
    kept: dict[str, Figure] = {}
    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, path: kept.setdefault(path.name, figure) and path)
        plots.plot_table(table, folder)
    return kept


def test_a_run_has_one_colour_in_all_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a run before it has no second epoch, and is not in the panel without step 0."""
    short = made(tmp_path / "short", loss=2.0, epochs=1)
    table = tabulate([short, *(made(tmp_path / str(n), loss=2.5 + n / 100) for n in range(3))])
    by_curve: dict[tuple[float, ...], set[str]] = {}
    panels = figures_of(table, tmp_path, monkeypatch)["curves.png"].axes
    assert len(panels) == 2
    for axes in panels:
        for line in axes.lines:
            by_curve.setdefault(tuple(line.get_ydata()[-2:]), set()).add(str(line.get_color()))
    assert len(by_curve) == 4
    assert all(len(colours) == 1 for colours in by_curve.values())
    assert len(set.union(*by_curve.values())) == 4


def test_only_runs_that_may_be_ranked_together_share_a_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = {"protocol": "heldout-ffffffffffff", "parts": {"documents": "d2"}}
    runs = [made(tmp_path / str(n), {"lr": 1e-5 * (n + 1)}, loss=2.5 + n) for n in range(3)]
    table = tabulate([*runs, made(tmp_path / "x", {"lr": 1.0}, loss=0.1, **other)])
    figures = figures_of(table, tmp_path, monkeypatch)
    [axes] = figures["heldout_loss_against_lr.png"].axes
    drawn = sorted(point for line in axes.lines for point in line.get_xdata())
    assert sorted({float(x) for x in drawn}) == pytest.approx([1e-5, 2e-5, 3e-5]), "not 1.0"
    files = plots.plot_table(table, tmp_path / "charts")
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
    text = report(table, "Runs of <b>", plots.plot_table(table, tmp_path / "charts"))
    page = Page(text)
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert re.search(r'<tr class="best"><td class="text">&lt;script', text)
    assert Page(report(tabulate([]), "nothing")).sources == []


def test_values_that_lie_close_do_not_hide_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a search draws them: each run has its own of everything."""
    values = [(0.118823, 8.6e-4), (0.146798, 2.1e-5), (0.279598, 2.9e-4), (0.385214, 5.6e-5)]
    dials = [{"mlm_probability": rate, "lr": lr} for rate, lr in values]
    table = tabulate([made(tmp_path / str(place), one, loss=2.5 + place) for place, one in enumerate(dials)])
    figure = figures_of(table, tmp_path, monkeypatch)["heldout_loss_against_mlm_probability.png"]
    [axes] = figure.axes
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {25.0}
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts() if "lr" in text.get_text()] == [], "a colour for each run"


def test_a_picture_of_few_colours_looks_as_it_was_drawn(tmp_path: Path):
    figure = plots.new_figure(4, 3)
    plots.styled(figure.add_subplot(), "x", "y").scatter(range(20), range(20), c=range(20), cmap="viridis")
    written = np.asarray(Image.open(plots.save(figure, tmp_path / "a.png")).convert("RGB"), dtype=int)
    drawn = np.asarray(figure.canvas.buffer_rgba(), dtype=int)[..., :3]  # type: ignore[attr-defined]
    assert written.shape == drawn.shape
    assert abs(written - drawn).max() < 20


# ---------------------------------------------------------------------------------------- one run


def test_a_run_is_drawn_from_the_rows_it_wrote(tmp_path: Path):
    rows = [
        {"step": 0, "epoch": 0.0, "eval/loss": 10.0, "eval/perplexity": 22026.0},
        {"step": 5, "epoch": 1.0, "train/loss": 7.0},
        {"step": 5, "epoch": 1.0, "eval/loss": 6.0, "eval/perplexity": 403.0},
    ]
    paths = plots.plot_run(rows, tmp_path / "plots", "a $\\frac{$ run")
    assert [path.name for path in paths] == ["loss.png", "perplexity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    before = paths[0].read_bytes()
    more = [*rows, {"step": 9, "epoch": 2.0, "eval/loss": 1.0}]
    assert plots.plot_run(more, tmp_path / "plots", "a $\\frac{$ run")[0].read_bytes() != before


def test_a_plot_holds_nothing_of_the_run_before(tmp_path: Path):
    few, many = (
        [{"epoch": n, "eval/loss": 9.0 - n, "eval/perplexity": 5.0 ** (9 - n)} for n in range(m)] for m in (2, 5)
    )
    first = [path.read_bytes() for path in plots.plot_run(few, tmp_path, "a run")]
    plots.plot_run(many, tmp_path, "another")
    assert [path.read_bytes() for path in plots.plot_run(few, tmp_path, "a run")] == first


def test_no_state_of_matplotlib_is_touched(tmp_path: Path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.plot_table(grid(tmp_path / "runs", 2), tmp_path / "charts")
    plots.plot_run([{"epoch": 1.0, "eval/loss": 1.0}], tmp_path, "a run")
    assert dict(mpl.rcParams) == before
