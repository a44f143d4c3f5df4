"""A real training on a real MLflow server, on sqlite and on PostgreSQL: all of it arrives, also when it was killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.runs.run import Run
from mlmx.tracking import store
from tests.support.processes import ended, reached, started, wait_until
from tests.support.servers import Server, postgres, postgres_program, serving
from tests.support.tracked import history, logged
from tests.support.trainings import command

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path, _store: Path) -> Iterator[Server]:
    """An MLflow server on each of the databases."""
    (folder := tmp_path / "server").mkdir()
    if request.param == "sqlite":
        with serving(folder, _store) as running:
            yield running
        return
    if postgres_program("postgres") is None or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL (Debian: postgresql) and psycopg2-binary, of the extra `test`")
    with postgres() as database, serving(folder, database) as running:
        yield running


def test_a_run_killed_and_resumed_is_whole_on_a_server(
    server: Server, tiny: Path, corpus: Path, outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from mlflow import MlflowClient

    run = Run(outputs / "train" / "run")
    where = ["tracking=server", f"tracking.uri={server.uri}", "trainer.save_steps=5"]
    process = started(command(tiny, corpus, run.folder, *where), outputs, tmp_path / "said.txt")
    wait_until(lambda: reached(run.folder, 7) and bool(run.read_json("mlflow.json").get("run_id")), process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    run_id = run.read_json("mlflow.json")["run_id"]
    client = MlflowClient(server.uri)
    assert client.get_run(run_id).info.status == "RUNNING"

    assert main(["train", f"resume={run.folder}"]) == 0
    assert "MLflow" not in capsys.readouterr().err
    found = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
    assert [(one.info.run_id, one.info.status) for one in found] == [(run_id, "FINISHED")]
    [one] = found
    told = run.read_json("mlflow.json")
    assert (one.info.start_time, one.info.end_time) == (told["started"], told["ended"])
    assert one.data.params == told["params"]
    assert one.data.params["chunk_size"] == "24"
    assert {key: one.data.tags[key] for key in told["tags"]} == told["tags"]
    report = run.read_json("data.json")
    digests = {tag.value: given.dataset.digest for given in one.inputs.dataset_inputs for tag in given.tags}
    assert digests == {
        context: report[split]["sha256"][:36]
        for context, split in (("training", "train"), ("validation", "eval"), ("testing", "heldout"))
    }

    made: Any = SimpleNamespace(run=run, run_id=run_id, status="FINISHED")
    there, wanted = (
        [point for point in points if point[0] != "epoch"]  # which MLflow has once a step
        for points in (history(store.server(uri=server.uri), made), logged(made))
    )
    assert there == wanted
    assert len(there) > 60

    saved = [*run.checkpoints.glob("*/model.safetensors"), run.model / "model.safetensors"]
    weights = sorted(path.read_bytes() for path in saved)
    assert sorted(path.read_bytes() for path in server.artifacts.rglob("model.safetensors")) == weights
    assert len(weights) == 5
    sent = {path.name: path.read_bytes() for path in server.artifacts.rglob("*.json*")}
    assert sent["metrics.jsonl"] == (run.folder / "metrics.jsonl").read_bytes()
    assert json.loads(sent["result.json"])["status"] == "FINISHED"
    assert main(["sync", "run=last"]) == 0
    assert f"{server.uri} has all of it" in capsys.readouterr().out
