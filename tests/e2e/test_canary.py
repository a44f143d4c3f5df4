"""Secrets in the environment and in requests, real runs, a real server: no byte written or shown is of a secret."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlmx.commands.main import main
from tests.support.servers import serving

NAMES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *(
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "WANDB_API_KEY",
        "DATABASE_PASSWORD",
        "MY_SECRET",
    ),
)
CANARIES = {name: f"canary-{number}-5e1f0c9a" for number, name in enumerate(NAMES)}
FORMED = "hf_" + "Canary" * 6  # known by its form, in no variable


@dataclass(frozen=True)
class Done:
    """What two runs and some refusals wrote and showed."""

    outputs: Path
    shown: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, _store: Path, tiny: Path, corpus: Path) -> Done:
    """A run to a server, a sweep to the local store, and requests that are refused, with canaries everywhere."""
    outputs = tmp_path_factory.mktemp("canary") / "outputs"
    (outputs / "served").mkdir(parents=True)
    small = ["model=distilbert", f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "chunk_size=32"]
    small += ["dataset.train_chunks=8", "dataset.eval_chunks=8", "heldout.documents=4", "epochs=1"]
    note = f"note='{' '.join(CANARIES.values())} {FORMED} http://user:{CANARIES['MY_SECRET']}@host/x'"
    shown = outputs.parent / "shown"
    with pytest.MonkeyPatch.context() as patch, shown.open("w") as file, serving(outputs / "served", _store) as server:
        for name, value in CANARIES.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
        patch.setenv("MLMX_OUTPUTS", str(outputs))
        patch.setattr("sys.stdout", file)
        patch.setattr("sys.stderr", file)
        address = f"http://somebody:{CANARIES['MLFLOW_TRACKING_PASSWORD']}@127.0.0.1:{server.port}"
        at = ["tracking=server", f"tracking.uri={server.uri}"]
        assert main(["train", *small, *at, note]) == 0
        assert main(["train", "-m", *small, "tracking=local", "seed=1", note]) == 0
        assert main(["evaluate", "run=last"]) == 0
        patch.setenv("MLMX_OUTPUTS", str(outputs.parent / "other"))
        assert main(["evaluate", f"run={next(outputs.glob('train/*/0'))}"]) == 0
        patch.setenv("MLMX_OUTPUTS", str(outputs))
        for wrong in (
            ["tracking=server", f"tracking.uri={address}"],
            [f"dataset.path={CANARIES['HF_TOKEN']}/reviews.jsonl"],
            [f"model.path=https://hub/{FORMED}"],
            [f"run_name={CANARIES['AWS_SECRET_ACCESS_KEY']}"],
        ):
            assert main(["train", *small, *wrong]) == 2
            assert main(["train", "-m", *small, *wrong, "seed=1,2"]) == 2
    return Done(outputs, shown.read_text())


def test_no_byte_that_was_written_is_a_secrets(done: Done):
    files = [path for path in done.outputs.rglob("*") if path.is_file()]
    kinds = {path.name for path in files}
    assert {"config.yaml", "overrides.yaml", "multirun.yaml", "train.log", "result.json", "mlflow.db"} <= kinds
    assert any("mlartifacts" in path.parts for path in files)
    assert any("cache" in path.parts for path in files)
    assert any("served" in path.parts and "artifacts" in path.parts for path in files)
    secrets = [value.encode() for value in (*CANARIES.values(), FORMED, "CanaryCanary")]
    found = [path for path in files if any(secret in path.read_bytes() for secret in secrets)]
    assert found == []
    assert [path for path in done.outputs.rglob("*") if any(s in str(path).encode() for s in secrets)] == []


def test_nothing_that_was_shown_is_a_secret(done: Done):
    assert [name for name, value in CANARIES.items() if value in done.shown] == []
    assert FORMED not in done.shown
    refused = [line for line in done.shown.splitlines() if line.startswith("mlmx: ") and "***" in line]
    assert len(refused) >= 8
    assert any("tracking.uri=http://***@127.0.0.1" in line and "MLFLOW_TRACKING_PASSWORD" in line for line in refused)


def test_a_run_outside_outputs_is_scored_and_not_written_to(done: Done):
    [kept] = done.outputs.glob("train/**/evaluations.jsonl")  # of the evaluation made before outputs/ was another
    assert len(kept.read_text().splitlines()) == 1
    assert done.shown.count("\nprotocol heldout-") == 2
    assert "not kept with the run: it lies outside" in done.shown


def test_what_was_taken_out_left_its_mark_and_the_runs_are_whole(done: Done):
    """Else nothing would have been looked for: the notes came through to the folders and to both stores."""
    from mlflow import MlflowClient

    stores = [done.outputs / "mlflow.db", done.outputs / "served" / "mlflow.db"]
    for store, number in zip(stores, (2, 1), strict=True):  # a sweep with its job, a run
        client = MlflowClient(f"sqlite:///{store}")
        found = client.search_runs([client.get_experiment_by_name("mlmx").experiment_id])
        assert len(found) == number
        for run in found:
            assert run.info.status == "FINISHED"
            assert " ".join(["***"] * len(CANARIES)) in run.data.tags["mlflow.note.content"]
            assert "http://***@host/x" in run.data.tags["mlflow.note.content"]
        assert max(len(run.data.metrics) for run in found) > 10
    results = [json.loads(path.read_text()) for path in (done.outputs / "train").glob("**/result.json")]
    assert [result["status"] for result in results] == ["FINISHED"] * 2
