"""`compare`: what may be ranked is ranked, by how much is said, and nothing of a run's state is a traceback."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from mlmx.commands.main import main
from mlmx.comparison.curves import plain_curves
from mlmx.comparison.ranking import Table, tabulate, what_differs
from mlmx.comparison.rows import Row
from mlmx.comparison.text import DIFFERENCE, columns, csv_text, markdown, number_text, plain, rich_table
from mlmx.config.errors import RequestError
from mlmx.runs.run import HELDOUT_FILE, Run
from tests.support.made_runs import made

OTHER = {"protocol": "heldout-ffffffffffff", "parts": {"documents": "d2", "tokens": "t2"}, "documents": 20}


def names(rows: list[Row]) -> list[str]:
    return [row.name for row in rows]


def in_terminal(table: Table, width: int) -> str:
    shown = io.StringIO()
    Console(file=shown, width=width, force_terminal=False).print(rich_table(table, width))
    return shown.getvalue()


def table_of(*runs: Run, **options: Any) -> Table:
    return tabulate(runs, **options)


# ---------------------------------------------------------------------------------------- ranking


def test_the_best_is_that_of_the_lowest_heldout_loss_and_only_what_varies_is_shown(tmp_path: Path):
    given = [(1e-5, 2.6), (2e-5, 2.4), (5e-5, 2.5)]
    table = tabulate([made(tmp_path / str(n), {"lr": lr}, loss=loss) for n, (lr, loss) in enumerate(given)])
    assert names(table.rows) == ["1", "2", "0"]
    assert table.keys == ["lr"]
    assert [row.varies for row in table.rows] == [{"lr": 2e-5}, {"lr": 5e-5}, {"lr": 1e-5}]
    assert table.best is table.rows[0]
    assert table.refusal == ""
    assert table.rows[0].metrics["minutes"] == 1.5
    interval = table.rows[0].interval
    assert interval is not None
    assert interval[0] < 2.4 < interval[1]


def test_differences_are_paired(tmp_path: Path):
    """The runs' own intervals overlap by far; on the same documents one is better."""
    table = table_of(made(tmp_path / "a", loss=2.40), made(tmp_path / "b", loss=2.43))
    assert table.best is not None
    assert (table.best.interval or (0, 0))[1] > 2.43
    found = table.differences["b"]
    assert found.mean == pytest.approx(0.03)
    assert 0 < found.low < 0.03 < found.high
    assert set(table.differences) == {"b"}
    noisy = table_of(made(tmp_path / "c", loss=2.401, noise=0.2), made(tmp_path / "d", loss=2.402, noise=0.2))
    assert not noisy.differences["d"].is_told_apart
    assert "not told apart from it: d" in plain(noisy)


def test_runs_of_other_protocols_are_ranked_apart_and_the_part_that_differs_is_named(tmp_path: Path):
    runs = [made(tmp_path / "a", loss=2.5), made(tmp_path / "b", loss=2.4), made(tmp_path / "c", loss=1.0, **OTHER)]
    table = tabulate(runs)
    assert table.best is None
    assert [names(group.rows) for group in table.groups] == [["b", "a"], ["c"]]
    assert table.refusal == (
        "these runs were not all measured alike and are ranked apart: the choice of held-out documents differs"
    )
    assert set(table.differences) == {"a"}
    for text in (plain(table), markdown(table).replace("\\", "")):
        assert "ranked apart: the choice of held-out documents differs" in text
        assert "heldout-ffffffffffff: 20 documents of reviews" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": "t2", "vocabulary": 50265}, "the tokenizer's vocabulary differs; sort=heldout/bits_per_byte"),
        ({"rate": 0.3}, "the share of targets differs"),
        ({"version": 2}, "the version of the draws differs"),
        ({"documents": "d2", "tokens": "t2", "rate": 0.3}, "documents and the share of targets differ"),
    ],
)
def test_every_part_of_a_protocol_has_its_words(changed: dict[str, Any], words: str, tmp_path: Path):
    one = made(tmp_path / "a")
    other = made(tmp_path / "b", protocol="heldout-ffffffffffff", parts=changed)
    assert words in tabulate([one, other]).refusal


def test_parts_that_were_not_recorded_are_not_guessed(tmp_path: Path):
    one, other = made(tmp_path / "a"), made(tmp_path / "b", protocol="heldout-ffffffffffff")
    for run in (one, other):
        report = run.read_json("data.json")
        del report["heldout"]["protocol_parts"]
        run.write_json("data.json", report)
    assert "something that was not recorded differs" in tabulate([one, other]).refusal
    assert what_differs({"a": 1}, {"b": 2}) == []


def test_other_tokenizers_are_compared_by_bits_per_byte_if_they_saw_the_same_texts(tmp_path: Path):
    other = {"protocol": "heldout-ffffffffffff", "parts": {"tokens": "t2", "vocabulary": 50265}}
    runs = [made(tmp_path / "a", loss=2.5), made(tmp_path / "b", loss=2.4, **other)]
    assert tabulate(runs).best is None
    table = tabulate(runs, "heldout/bits_per_byte")
    assert names(table.rows) == ["b", "a"]
    assert table.best is table.rows[0]
    assert table.refusal == ""
    assert table.differences == {}, "their targets are not the same"
    assert "heldout/bits_per_byte" in plain(table).splitlines()[0]
    elsewhere = made(tmp_path / "c", loss=2.3, **OTHER)
    assert tabulate([*runs, elsewhere], "heldout/bits_per_byte").best is None


def test_a_run_without_heldout_documents_is_listed_and_not_ranked(tmp_path: Path):
    table = table_of(made(tmp_path / "a", loss=None, metrics={"eval/loss": 0.1}), made(tmp_path / "b"))
    assert names(table.rows) == ["b", "a"]
    assert names(table.unranked) == ["a"]
    assert table.best is table.rows[0]


def test_without_heldout_documents_eval_loss_ranks_runs_of_the_same_chunks_and_masks_only(tmp_path: Path):
    def run(name: str, loss: float, **dials: Any) -> Run:
        return made(tmp_path / name, dials, loss=None, metrics={"eval/loss": loss})

    same = [run("a", 2.0, lr=1e-5), run("b", 1.9, lr=2e-5)]
    table = tabulate(same)
    assert (table.judge, names(table.rows)) == ("eval/loss", ["b", "a"])
    assert table.best is table.rows[0]
    for name, dials in {"c": {"chunk_size": 64}, "d": {"mlm_probability": 0.4}, "e": {"masking.name": "span"}}.items():
        other = tabulate([*same, run(name, 1.0, **dials)])
        assert other.best is None
        assert names(other.groups[0].rows) == ["b", "a"]
        assert "differ" in other.refusal


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("heldout/loss", ["a", "b", "c"]),
        ("heldout/accuracy", ["c", "b", "a"]),
        ("final/heldout_accuracy_rare", ["c", "b", "a"]),
        ("of_another_tool/accuracy", ["c", "b", "a"]),
        ("train/tokens_per_second", ["b", "a", "c"]),
        ("perf/seconds", ["b", "c", "a"]),
        ("-perf/seconds", ["a", "c", "b"]),
    ],
)
def test_rows_are_sorted_from_the_best_value(sort: str, order: list[str], tmp_path: Path):
    numbers = {"a": (2.1, 0.1, 300.0, 3.0), "b": (2.2, 0.2, 400.0, 1.0), "c": (2.3, 0.3, 200.0, 2.0)}
    runs = []
    for name, (loss, accuracy, speed, seconds) in numbers.items():
        metrics = {"train/tokens_per_second": speed, "perf/seconds": seconds}
        where = ("heldout/accuracy", "final/heldout_accuracy_rare", "of_another_tool/accuracy")
        metrics |= dict.fromkeys(where, accuracy)
        runs.append(made(tmp_path / name, loss=loss, metrics=metrics))
    table = tabulate(runs, sort)
    assert names(table.rows) == order
    assert table.best is not None
    assert table.best.name == "a", "which is best is for the yardstick to say"
    assert sort.removeprefix("-") in [column.name for column in columns(table)] or sort == "train/tokens_per_second"


def test_an_unknown_metric_is_refused_with_the_nearest(tmp_path: Path):
    with pytest.raises(RequestError, match=r"sort=heldout/los: none .* did you mean heldout/loss\?"):
        tabulate([made(tmp_path / "a")], "heldout/los")


# ------------------------------------------------------------------------------------ whatever state


def test_runs_that_have_not_finished_are_listed_with_what_is_known(tmp_path: Path):
    runs = [made(tmp_path / state.lower(), loss=2.0, status=state) for state in ("KILLED", "FAILED", "RUNNING")]
    table = tabulate([*runs, made(tmp_path / "done", loss=2.5)])
    assert table.best is not None
    assert table.best.name == "done"
    assert {row.name: (row.status, row.resumable) for row in table.rows} == {
        "done": ("FINISHED", False),
        "killed": ("KILLED", True),
        "running": ("RUNNING", False),
        "failed": ("FAILED", False),
    }
    killed = next(row for row in table.rows if row.name == "killed")
    assert killed.metrics["heldout/loss"] == pytest.approx(2.0), "from metrics.jsonl"
    assert killed.curves["heldout/loss"][0] == (0.0, 4.0)
    assert "KILLED, resumable" in plain(table)


def test_a_run_whose_process_is_gone_is_no_longer_running(tmp_path: Path):
    run = made(tmp_path / "a", status="RUNNING")
    for path in run.folder.iterdir():
        os.utime(path, (0, 0))
    [row] = tabulate([run]).rows
    assert (row.status, row.resumable) == ("KILLED", True)
    assert run.status == "RUNNING", "it is read, not written"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_not_ranked(value: float, tmp_path: Path):
    table = table_of(
        made(tmp_path / "a", metrics={"heldout/loss": value, "eval/perplexity": value}), made(tmp_path / "b")
    )
    assert names(table.unranked) == ["a"]
    assert table.differences == {}
    assert str(value) in plain(table)
    for text in (markdown, csv_text, plain_curves):
        text(table)


DAMAGE = {
    "config.yaml": [
        b"",
        b"a: [",
        b"- 1",
        b"lr: &a [*a]\n",
        b"\xff\xfe",
        b"x" * 200_000,
        b"lr: !!python/object:os.system {}",
    ],
    "result.json": [b"", b"{", b"[]", b'{"status": 3, "metrics": [], "seconds": "x", "protocol": {}}', b"[" * 100_000],
    "data.json": [b"{", b'{"heldout": [], "eval": 1}', b'{"heldout": {"protocol_parts": 3}, "eval": {}}'],
    "inputs.json": [b"{", b"[]"],
    "mlflow.json": [b"{", b'{"params": 3}'],
    "metrics.jsonl": [b"", b"{}\n", b'{"epoch": "x", "heldout/loss": null}\n[]\n', b"\xff\n" * 50, b'{"step": 1'],
    HELDOUT_FILE: [b"", b"PK", b"not zip"],
}


@pytest.mark.parametrize(("name", "contents"), [(name, one) for name, some in DAMAGE.items() for one in some])
def test_damaged_files_cost_what_they_held_and_no_more(name: str, contents: bytes, tmp_path: Path):
    runs = [
        made(tmp_path / "a", {"lr": 1e-5}),
        made(tmp_path / "b", {"lr": 2e-5}, loss=2.6),
        made(tmp_path / "c", loss=2.7),
    ]
    (runs[1].folder / name).write_bytes(contents)
    table = tabulate(runs)
    assert sorted(names(table.rows)) == ["a", "b", "c"]
    assert table.rows[0].name == "a"
    for text in (plain, markdown, csv_text, plain_curves):
        text(table)


def test_a_config_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path):
    other = made(tmp_path / "b", loss=2.6)
    path = other.folder / "config.yaml"
    path.write_text(path.read_text() + "\nnot_known_here: 3\n")
    table = tabulate([made(tmp_path / "a"), other])
    assert table.keys == ["not_known_here"]
    assert [row.varies for row in table.rows] == [{}, {"not_known_here": 3}]


def test_an_empty_folder_and_a_failed_job_without_one_are_rows(tmp_path: Path):
    (tmp_path / "b").mkdir()
    failures = {tmp_path / "c": "ValueError: too few chunks", tmp_path / "b": "out of memory"}
    table = table_of(made(tmp_path / "a"), failures=failures)
    found = {row.name: (row.status, row.note) for row in table.rows}
    assert found == {
        "a": ("FINISHED", ""),
        "b": ("FAILED", "out of memory"),
        "c": ("FAILED", "ValueError: too few chunks"),
    }
    assert "c: ValueError: too few chunks" in plain(table)
    assert tabulate([Run(tmp_path / "nowhere")]).rows[0].status == "UNKNOWN"
    assert tabulate([]).rows == []


def test_heldout_sums_of_another_time_are_not_used(tmp_path: Path):
    stale = made(tmp_path / "a", loss=2.5)
    result = stale.read_json("result.json")
    stale.write_json("result.json", result | {"metrics": result["metrics"] | {"heldout/loss": 2.2}})
    table = tabulate([stale, made(tmp_path / "b", loss=2.6)])
    assert table.best is not None
    assert (table.best.name, table.best.interval) == ("a", None)
    assert table.differences == {}


# -------------------------------------------------------------------------------------------- texts


def test_rows_are_called_by_the_shortest_end_of_their_folder_or_by_a_name_of_their_own(tmp_path: Path):
    runs = [made(tmp_path / one / two) for one, two in ("x0", "x1", "y0")]
    assert names(tabulate(runs).rows) == ["x/0", "x/1", "y/0"]
    named = made(tmp_path / "z", {"run_name": "mine"})
    assert set(names(tabulate([*runs, named]).rows)) == {"x/0", "x/1", "y/0", "mine"}
    assert len(tabulate([named, named]).rows) == 1
    twins = [made(tmp_path / name, {"run_name": "twin"}) for name in "pq"]
    assert names(tabulate(twins).rows) == ["p", "q"]


def test_keys_may_be_groups_and_what_follows_from_another_key_gets_no_column(tmp_path: Path):
    models = {"a": ("minilm", "1" * 40), "b": ("roberta", "2" * 40)}
    runs = [made(tmp_path / n, {"model.path": path, "model.revision": rev}) for n, (path, rev) in models.items()]
    table = tabulate(runs)
    assert table.keys == ["model.path", "model.revision"]
    assert "model.revision" not in plain(table).splitlines()[0]
    assert "with model.path differ: model.revision" in plain(table)
    assert "model.revision" in csv_text(table).splitlines()[0]
    chosen = tabulate(runs, keys=["model", "lr"])
    assert chosen.keys == ["model", "lr"]
    assert chosen.rows[0].varies == {"model": "minilm", "lr": 2e-05}


EVIL = '<script>alert(1)</script>|**x**\x1b[31m\u202e, "q"\n$\\frac{'


def test_names_are_shown_and_not_obeyed(tmp_path: Path):
    table = tabulate([made(tmp_path / "a", {"run_name": EVIL}), made(tmp_path / "b", loss=2.6)])
    assert "\x1b" not in plain(table)
    assert "<script>" not in markdown(table)
    assert len({line.count(" | ") for line in markdown(table).splitlines()[:4]}) == 1
    rows = list(csv.reader(io.StringIO(csv_text(table))))
    assert len({len(row) for row in rows}) == 1
    assert "<script>alert(1)" in in_terminal(table, 200)


def test_dials_of_strange_names_are_shown_and_not_obeyed(tmp_path: Path):
    strange = "a\x1b[31m\n| dial"
    table = tabulate([made(tmp_path / str(value), {strange: value}, loss=value) for value in (1, 2)])
    assert table.keys == [strange]
    for text in (plain(table), markdown(table)):
        assert "\x1b" not in text
        assert len([line for line in text.splitlines() if "dial" in line]) == 1
        assert len([line for line in text.splitlines() if "FINISHED" in line]) == 2


def test_a_log_has_a_line_per_run_whose_columns_stand_below_each_other(tmp_path: Path):
    """Names of any length and script are whole; nothing but text, so that awk and cut can take columns."""
    given = ["x" * 300, "数据 → 😀", "short"]
    runs = [made(tmp_path / str(n), {"run_name": name, "lr": 1e-5 * n}) for n, name in enumerate(given)]
    head, *lines = plain(tabulate(runs)).splitlines()[:4]
    assert sorted(line.split("  ")[0] for line in lines) == sorted(given)
    assert all(line.endswith("  FINISHED") and len(line.split("  ")) >= 8 for line in lines)
    assert not {"\x1b", "│", "─", "|"} & set("".join([head, *lines]))
    ends = {cell_len(line[: line.index("2.5000") + 6]) for line in lines}
    assert ends == {cell_len(head[: head.index("heldout/loss") + 12])}, "numbers end where their heading does"


def test_csv_holds_every_number_in_full(tmp_path: Path):
    table = tabulate([made(tmp_path / "a", {"lr": 1e-5}), made(tmp_path / "b", loss=2.6)])
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert [float(row["heldout/loss"]) for row in rows] == [row.metrics["heldout/loss"] for row in table.rows]
    assert float(rows[1]["difference_low"]) == table.differences["b"].low
    assert [row["lr"] for row in rows] == ["1e-05", "2e-05"]
    assert [row["folder"] for row in rows] == [str(row.run.folder) for row in table.rows]


def test_a_narrow_terminal_gets_fewer_columns_but_the_ones_that_matter(tmp_path: Path):
    table = tabulate([made(tmp_path / "a", {"lr": 1e-5}), made(tmp_path / "b", loss=2.6)])
    shown = in_terminal(table, 90)
    assert max(map(len, shown.splitlines())) <= 90
    head = set(shown.splitlines()[1].split())
    assert {"run", "lr", "heldout/loss", "status"} <= head
    assert "eval/perplexity" not in head
    sorted_by = in_terminal(tabulate([row.run for row in table.rows], "train/tokens_per_second"), 80)
    assert "tokens/s" in sorted_by.splitlines()[1]


def test_a_terminal_has_a_line_per_run_also_where_runs_are_ranked_apart(tmp_path: Path):
    runs = [made(tmp_path / "a", {"lr": 1e-5}), made(tmp_path / "b", loss=2.6), made(tmp_path / "c", loss=1.0, **OTHER)]
    shown = in_terminal(tabulate([*runs, made(tmp_path / "d", status="FAILED")]), 100)
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    firsts = [line.split()[0] for line in lines]
    assert firsts[0] == "run"
    assert firsts[2:] == ["heldout-0123456789ab", "a", "b", "heldout-ffffffffffff", "c", "not", "d"]


def test_no_digit_is_cut_off_where_there_is_no_space(tmp_path: Path):
    table = tabulate([made(tmp_path / "a", {"lr": 1e-5}), made(tmp_path / "b", loss=2.6)])
    shown = in_terminal(table, 60)
    digits = [sign for sign in shown if sign.isdigit()]
    kept = [column for column in columns(table) if column.name in ("run", "lr", "heldout/loss", DIFFERENCE)]
    assert len(kept) == 4
    for sign in "".join(column.text(row) for column in kept for row in table.rows):
        if sign.isdigit():
            digits.remove(sign)
    assert "…" not in shown


@pytest.mark.parametrize("value", [1e-9, 2.0, 31186.4, 1e300, -0.5, math.nan, math.inf])
def test_numbers_are_short(value: float):
    assert len(number_text(value if abs(value) < 1e9 else math.inf)) < 12


def test_curves_in_text_begin_at_step_0_and_end_with_names(tmp_path: Path):
    table = tabulate([made(tmp_path / "a", loss=3.9, epochs=1), made(tmp_path / "b", loss=3.0, epochs=1)])
    lines = plain_curves(table, width=20, height=5).splitlines()
    assert lines[0] == "heldout/loss over epochs"
    assert (lines[1].split()[0], lines[5].split()[0]) == ("4.0", "3.0")
    assert lines[5].endswith(" b")
    assert [line for line in lines if line.endswith(" a")]
    assert lines[-1].split() == ["0", "1"]
    longer = tabulate([made(tmp_path / "c", loss=2.4), made(tmp_path / "d", loss=2.5)])
    assert plain_curves(longer).splitlines()[0] == "heldout/loss over epochs, after 4 before training"
    assert plain_curves(tabulate([made(tmp_path / "e", status="FAILED")])) == ""


# ------------------------------------------------------------------------------------------ command


def sweep(outputs: Path, *losses: float, name: str = "one", started: int = 1) -> Path:
    folder = outputs / "train" / name
    for number, loss in enumerate(losses):
        made(folder / str(number), {"lr": 1e-5 * (number + 1)}, loss=loss)
    (folder / "sweep.json").write_text(json.dumps({"name": name, "started": started}))
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compare", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compare", *arguments]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("mlmx: ")
    assert told.err.count("\n") == 1
    return told.err


def test_without_arguments_it_is_the_last_sweep(outputs: Path, capsys: pytest.CaptureFixture[str]):
    sweep(outputs, 2.9, 2.8, name="new", started=2)
    sweep(outputs, 2.5, 2.4, 2.3, name="old", started=1)
    text = shown(capsys)
    assert text.startswith(f"2 runs of the sweep in {outputs / 'train' / 'new'}\n")
    assert "best by heldout/loss: 1 (2.8000)" in text
    assert "⠀" in text
    assert "3 runs of the sweep" in shown(capsys, f"sweep={outputs / 'train' / 'old'}")
    assert "2 runs of the sweep" in shown(capsys, "sweep=last")


def test_without_a_sweep_it_is_the_finished_runs_of_the_last_experiment(
    outputs: Path, capsys: pytest.CaptureFixture[str]
):
    for name, experiment, status in (("a", "x", "FINISHED"), ("b", "y", "FINISHED"), ("c", "y", "KILLED")):
        run = made(outputs / "train" / name, {"tracking.experiment": experiment}, status=status)
        (run.folder / "overrides.yaml").write_text("[]")
        os.utime(run.folder / "overrides.yaml", (ord(name), ord(name)))
    assert shown(capsys).startswith("1 runs of experiment y")
    assert shown(capsys, "experiment=y").startswith("2 runs of experiment y")
    assert "did you mean" in refused(capsys, "experiment=yy")


def test_runs_are_named_by_folder_or_id(outputs: Path, capsys: pytest.CaptureFixture[str]):
    folder = sweep(outputs, 2.5, 2.4)
    other = made(outputs / "train" / "other", loss=2.6)
    other.write_json("result.json", other.read_json("result.json") | {"run_id": "abc123"})
    text = shown(capsys, f"runs=[{folder}/0,abc123]")
    assert text.startswith("2 runs of those named")
    assert text == shown(capsys, f"runs={folder}/0", "runs=abc123")


def test_what_is_asked_for_wrongly_is_refused_in_one_line(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert "no sweep and no finished run" in refused(capsys)
    folder = sweep(outputs, 2.5, 2.4)
    before = sorted(outputs.rglob("*"))
    for arguments, words in {
        (f"runs=[{folder}/9]",): ["runs=", "no such run"],
        ("runs=[a]", "sweep=b"): ["runs=[a] and sweep=b", "give one of them"],
        ("tracking.uri=http://127.0.0.1:9",): ["tracking.uri", "tracking=server"],
        ("runs=[a]", "experiment=b"): ["runs=[a] and experiment=b", "give one of them"],
        (f"sweep={tmp_path}",): ["sweep=", "no sweep's folder"],
        ("sort=heldout/los",): ["sort=heldout/los", "did you mean heldout/loss?"],
        ("out=[a.pdf]",): ["out=a.pdf", ".html, .png, .csv, .md"],
        ("--out", "nowhere/a.csv"): ["out=nowhere/a.csv", "no folder"],
        ("--out",): ["--out: needs a file"],
        ("tracking=none",): ["tracking=none"],
        ("tracking=server", "tracking.uri=ftp://x"): ["tracking.uri=ftp://x"],
    }.items():
        line = refused(capsys, *arguments)
        assert [word for word in words if word not in line] == [], line
    assert sorted(outputs.rglob("*")) == before


def test_files_are_written_where_the_user_says(outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sweep(outputs, 2.5, 2.4)
    there = tmp_path / "a folder, mine"
    there.mkdir()
    (there / "table.csv").write_text("old")
    files = [there / name for name in ("report.html", "table.csv", "table.md", "curves.png", "parallel.png")]
    shown(capsys, "--out", str(files[0]), f"--out={files[1]}", *(f"out={path}" for path in files[2:]))
    assert sorted(there.iterdir()) == sorted(files)
    assert files[1].read_text().startswith("run,status,protocol,lr,")
    assert files[2].read_text().startswith("# Runs of the sweep in ")
    page = files[0].read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert "http" not in page
    assert files[3].read_bytes()[:4] == files[4].read_bytes()[:4] == b"\x89PNG"
    assert files[3].read_bytes() != files[4].read_bytes()


def test_a_file_that_cannot_be_replaced_is_left_as_it_was(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sweep(outputs, 2.5)
    (tmp_path / "table.csv").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["compare", "--out", str(tmp_path / "table.csv")]) == 1
    assert (tmp_path / "table.csv").read_text() == "old"
    assert list(tmp_path.glob(".table*")) == []


def test_a_hundred_runs_are_compared_without_a_heavy_library(outputs: Path, record_property: Any):
    sweep(outputs, *(2.5 + 0.001 * ((37 * n) % 100) for n in range(100)))
    code = (
        "import sys; from mlmx.commands.main import main; code = main(['compare']); "
        "heavy = {'torch', 'transformers', 'mlflow', 'matplotlib', 'datasets', 'pandas'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("100 runs of the sweep")
    assert "best by heldout/loss: 0 (2.5000)" in done.stdout


def test_a_terminal_gets_colours(outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    sweep(outputs, 2.5, 2.4)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(capsys)
    assert "best by heldout/loss: 1" in text
    assert "⠀" in text


def test_what_the_sweep_hands_over_is_frozen(tmp_path: Path):
    [row] = tabulate([made(tmp_path / "a")]).rows
    assert replace(row, name="b") != row
