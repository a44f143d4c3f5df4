"""`compare` through MLflow: runs of a server, or of a store whose run folders are gone, as if these were here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlmx.commands.main import main
from mlmx.comparison.ranking import Table, tabulate
from mlmx.comparison.text import csv_text
from mlmx.config.errors import RequestError
from mlmx.runs.run import Run
from mlmx.tracking import read
from mlmx.tracking import store as stores
from mlmx.tracking.mirror import update
from mlmx.tracking.store import Store
from tests.support.made_runs import made
from tests.support.servers import Server

pytestmark = pytest.mark.timeout(1800)


def recorded(store: Store, folder: Path, *, parent: bool = False) -> list[Run]:
    """Three runs that differ, one of them killed, in MLflow; with ``parent`` as the jobs of a sweep."""
    runs = [
        made(folder / "a", {"lr": 1e-5}, loss=2.5),
        made(folder / "bb", {"lr": 2e-5}, loss=2.4, metrics={"eval/perplexity": float("inf")}),
        made(folder / "ccc", {"lr": 3e-5}, loss=2.6, status="KILLED"),
    ]
    for run in runs:
        update(run, store)
    if parent:
        client, experiment = _client(store)
        above = client.create_run(experiment, run_name="sweep").info.run_id
        for run in runs:
            client.set_tag(run.read_json("result.json")["run_id"], "mlflow.parentRunId", above)
    return runs


def _client(store: Store):
    from mlmx.tracking.store import connect

    return connect(store)


def facts(table: Table) -> list[tuple[object, ...]]:
    """What a table says of its runs, whatever they are called in it."""
    return [
        (
            *(row.run_id, row.status, row.resumable, row.protocol, row.interval),
            *(row.dials["lr"], row.curves["heldout/loss"]),
            *(row.metrics.get("heldout/loss"), row.metrics.get("eval/perplexity")),
        )
        for row in table.rows
    ]


def test_runs_of_a_server_are_compared_as_those_of_folders(
    server: Server, tmp_path: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    store = stores.server(uri=server.uri, experiment="an experiment")
    runs = recorded(store, tmp_path / "runs", parent=True)
    local = tabulate(runs)
    found = tabulate(read.fetch(store, tmp_path / "fetched"))
    assert facts(found) == facts(local)
    assert found.keys == local.keys == ["lr"]
    assert [found.differences[row.name] for row in found.rows[1:2]] == [local.differences["a"]]

    ids = [row.run_id for row in local.rows]
    shutil.rmtree(tmp_path / "runs")
    address = ["tracking=server", f"tracking.uri={server.uri}"]
    assert main(["compare", *address, "experiment=an experiment", "--out", str(tmp_path / "a.csv")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"3 runs of experiment an experiment in {server.uri}")
    assert "KILLED, resumable" in text
    assert (tmp_path / "a.csv").read_text().count("\n") == 4
    here = made(tmp_path / "here", loss=2.3)
    assert main(["compare", *address, f"runs=[{ids[0]},{here.folder}]"]) == 0
    assert "best by heldout/loss: here" in capsys.readouterr().out
    client, _ = _client(store)
    parent = client.get_run(ids[0]).data.tags["mlflow.parentRunId"]
    assert main(["compare", *address, f"sweep={parent}"]) == 0
    assert "3 runs of sweep" in capsys.readouterr().out
    assert not outputs.exists()

    for wrong, words in {
        ("experiment=an experimnt",): "did you mean an experiment?",
        (f"runs=[{'0' * 32}]",): "has no run of this id",
        (f"sweep={'0' * 32}",): "has no run of sweep",
    }.items():
        assert main(["compare", *address, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_a_server_that_is_away_is_said_in_one_line(capsys: pytest.CaptureFixture[str], outputs: Path):
    assert main(["compare", "tracking=server", "tracking.uri=http://127.0.0.1:9"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("mlmx: http://127.0.0.1:9: cannot be read")
    assert line.count("\n") == 1
    assert not outputs.exists()


def test_a_local_store_is_read_where_the_folders_are_gone(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    runs = recorded(stores.local(experiment="mlmx"), tmp_path / "runs")
    before = csv_text(tabulate(runs)).splitlines()[1].split(",")
    shutil.rmtree(tmp_path / "runs")
    assert main(["compare", "tracking=local", "--out", str(tmp_path / "a.csv")]) == 0
    assert "3 runs of experiment mlmx" in capsys.readouterr().out
    after = (tmp_path / "a.csv").read_text().splitlines()[1].split(",")
    assert after[1:4] == before[1:4]


def test_without_artifacts_params_and_histories_are_what_is_known(store: Path, tmp_path: Path):
    local = stores.local()
    runs = recorded(local, tmp_path / "runs")
    assert local.artifacts is not None
    shutil.rmtree(local.artifacts)
    table = tabulate(read.fetch(local, tmp_path / "fetched"))
    assert table.keys == ["lr"]
    assert table.best is not None
    assert table.best.metrics["heldout/loss"] == pytest.approx(2.4)
    assert table.best.curves == tabulate(runs).rows[0].curves
    assert table.differences == {}


def test_reading_makes_nothing_in_the_store(store: Path, tmp_path: Path):
    with pytest.raises(RequestError, match=r"experiment=other: .* has no such experiment"):
        read.fetch(stores.local(experiment="other"), tmp_path / "fetched")
    client, _ = _client(stores.local())
    assert client.get_experiment_by_name("other") is None
