"""One sweep is one parent with its jobs; issued again it makes no run twice, and however it ends it says so."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands import train as command_module
from mlmx.commands.main import main
from mlmx.config.schema import TrainConfig
from mlmx.runs import process, provenance
from mlmx.runs.run import Run, all_runs
from mlmx.sweeps.sweep import Sweep, all_sweeps
from mlmx.tracking.follower import Follower
from mlmx.tracking.mirror import Mirror
from mlmx.tracking.tracker import Tracker
from tests.support.processes import ended, reached, started, wait_until
from tests.support.sweeps import command, told

Sweeping = Callable[..., int]


@pytest.fixture
def sweep(tiny: Path, corpus: Path) -> Sweeping:
    return lambda *more: main(command(tiny, corpus, *more))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Learning rates of the runs that were really begun or gone on with, in order; no MLflow is asked."""
    own, rates = command_module.train, []

    def train(cfg: TrainConfig, *args: Any) -> float:
        rates.append(cfg.lr)
        return own(cfg, *args)

    monkeypatch.setattr("mlmx.commands.train.train", train)
    return rates


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with all of their record, whose model takes no step."""

    def fit(cfg: TrainConfig, ready: Any, run: Run, tracker: Tracker, stop_early: object) -> None:
        tracker.log(0, 0.0, ready.measure(ready.model))

    monkeypatch.setattr("mlmx.commands.train.fit", fit)
    monkeypatch.setattr("mlmx.commands.train.draw_plots", lambda run, title: [])


def the_sweep() -> Sweep:
    [found] = all_sweeps()
    return found


@pytest.mark.usefixtures("store")
def test_a_sweep_is_one_parent_with_its_jobs_nested(sweep: Sweeping, outputs: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep("lr=1e-4,1e-3", "note=which rate?") == 0
    folder = the_sweep().folder
    said = capsys.readouterr().out
    assert "sweep    2 jobs over lr\n" in said
    assert "\njob 1    lr=0.001\n" in said

    parent, children = told(outputs)
    assert parent.info.run_name == "sweep · lr"
    assert parent.info.status == "FINISHED"
    assert sorted(child.data.params["lr"] for child in children) == ["0.0001", "0.001"]
    best = min(children, key=lambda child: child.data.metrics["heldout/loss"])
    assert parent.data.tags["mlmx.best"] == best.info.run_id
    assert parent.data.metrics["best/heldout_loss"] == best.data.metrics["heldout/loss"]
    assert the_sweep().about().best == best.data.tags["mlmx.folder"]
    note = parent.data.tags["mlflow.note.content"]
    assert "train -m" in note
    assert "which rate?" in note
    assert "0.001" in note
    artifacts = outputs / "mlartifacts" / parent.info.run_id / "artifacts"
    for name in ("table.md", "table.csv", "report.html", "sweep.json"):
        assert (artifacts / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in (artifacts / "plots").iterdir()} == {
        path.name for path in (folder / "plots").iterdir()
    }


@pytest.mark.usefixtures("untaught")
def test_the_same_sweep_again_makes_no_run_twice_and_takes_in_new_values(sweep: Sweeping, trained: list[float]):
    assert sweep("lr=1e-4,1e-3", "tracking=none") == 0
    before = {run.folder: run.result() for run in all_runs()}
    assert sweep("tracking=none", "lr=1e-3,5e-3,1e-4") == 0, "another order, and a value more"
    assert trained == [1e-4, 1e-3, 5e-3]
    runs = the_sweep().runs()
    assert [run.config().lr for run in runs] == [1e-4, 1e-3, 5e-3]
    assert {run.folder: run.result() for run in all_runs()} | before == {run.folder: run.result() for run in runs}
    assert sweep("lr=1e-4,1e-3", "tracking=none", "run_name=named", "save_minutes=3") == 0
    assert len(trained) == 3, "what changes no number changes no run"
    assert sorted(path.name for path in the_sweep().folders()) == ["0", "1", "3"]


@pytest.mark.usefixtures("untaught")
def test_jobs_with_damaged_files_are_made_anew_and_no_others(sweep: Sweeping, trained: list[float]):
    assert sweep("lr=1e-4,1e-3,5e-3", "tracking=none") == 0
    jobs = the_sweep().jobs()
    (jobs[1].folder / "job.json").write_text('{"key": "a')
    (jobs[2].folder / "result.json").write_text('{"status": ["FINISHED"]}')
    assert sweep("lr=1e-4,1e-3,5e-3", "tracking=none") == 0
    assert trained == [1e-4, 1e-3, 5e-3, 1e-3, 5e-3]
    assert {run.config().lr: run.status for run in the_sweep().runs()} == dict.fromkeys((1e-4, 1e-3, 5e-3), "FINISHED")


@pytest.mark.usefixtures("untaught")
def test_another_sweep_is_another_one(sweep: Sweeping, trained: list[float]):
    for more in (["lr=1e-4"], ["lr=1e-4", "seed=1"], ["lr=1e-4", "seed=42,1"]):
        assert sweep(*more, "tracking=none") == 0
    assert len(all_sweeps()) == 3
    assert len(trained) == 4
    assert sweep("lr=1e-4", "tracking=none", "sweep.reuse=false") == 0
    assert len(all_sweeps()) == 4
    assert len(trained) == 5


@pytest.mark.usefixtures("untaught")
def test_other_texts_or_other_code_make_other_runs(
    sweep: Sweeping, corpus: Path, tmp_path: Path, trained: list[float], monkeypatch: pytest.MonkeyPatch
):
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(corpus.read_bytes())
    given = (f"dataset.path={texts}", "lr=1e-4", "tracking=none")
    assert sweep(*given) == 0
    rows = texts.read_text(encoding="utf-8").splitlines()
    texts.write_text("\n".join(rows[10:]) + "\n", encoding="utf-8")
    assert sweep(*given) == 0
    assert len(trained) == 2
    assert [run.folder.name for run in the_sweep().runs()] == ["1"], "the table shows the newest of each"
    monkeypatch.setattr(provenance, "code_version", lambda: "another")
    assert sweep(*given) == 0
    assert len(trained) == 3


@pytest.mark.usefixtures("store")
def test_a_description_that_was_edited_in_mlflow_stays(sweep: Sweeping, outputs: Path):
    from mlflow import MlflowClient

    assert sweep("lr=1e-3") == 0
    parent, _ = told(outputs)
    assert "Ended FINISHED." in parent.data.tags[provenance.NOTE]
    assert sweep("lr=1e-3") == 0
    again, _ = told(outputs)
    assert again.info.run_id == parent.info.run_id
    assert "Ended FINISHED." in again.data.tags[provenance.NOTE], "not that it is running"
    MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}").set_tag(parent.info.run_id, provenance.NOTE, "my own words")
    assert sweep("lr=1e-3") == 0
    assert told(outputs)[0].data.tags[provenance.NOTE] == "my own words"


@pytest.mark.usefixtures("store")
def test_a_failing_job_ends_no_other_and_is_tried_anew(
    sweep: Sweeping, trained: list[float], outputs: Path, capsys: pytest.CaptureFixture[str]
):
    given = ("trainer.adam_beta1=0.9,2,0.8", "lr=1e-3")
    assert sweep(*given) == 1
    said = capsys.readouterr()
    assert "mlmx: job 1 of the sweep (trainer.adam_beta1=2): ValueError: Invalid beta parameter" in said.err
    assert said.err.endswith("mlmx: 1 of 3 jobs failed; the same command again tries them anew\n")
    assert [run.status for run in the_sweep().runs()] == ["FINISHED", "FAILED", "FINISHED"]
    parent, children = told(outputs)
    assert parent.info.status == the_sweep().about().status == "FAILED"
    assert sorted(child.info.status for child in children) == ["FAILED", "FINISHED", "FINISHED"]
    assert "Invalid beta" in (the_sweep().folder / "table.md").read_text(encoding="utf-8")
    assert sweep(*given) == 1
    assert len(trained) == 4
    assert len(told(outputs)[1]) == 3


@pytest.mark.usefixtures("untaught")
def test_a_job_that_is_refused_late_leaves_its_reason(
    sweep: Sweeping, corpus: Path, capsys: pytest.CaptureFixture[str]
):
    """That a dataset is too small for a chunk size shows when it has been read."""
    assert sweep("chunk_size=16,512", "dataset.train_chunks=600", "tracking=none") == 1
    [failed] = [job for job in the_sweep().jobs() if job.failed]
    error = failed.about.error or ""
    assert error.startswith("job 1 of the sweep (chunk_size=512): the corpus gives 116 chunks of 512 tokens")
    assert {path.name for path in failed.folder.iterdir()} == {"job.json"}
    assert error in capsys.readouterr().err


@pytest.mark.usefixtures("store")
def test_children_made_while_mlflow_was_away_are_nested_at_the_end(
    sweep: Sweeping, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    own, calls = Mirror.connect, []

    def away_at_first(mirror: Mirror) -> Any:
        calls.append(mirror)
        if len(calls) == 1:
            raise ConnectionError("nobody there")
        return own(mirror)

    monkeypatch.setattr(Mirror, "connect", away_at_first)
    assert sweep("lr=1e-4,1e-3") == 0
    assert "nobody there" in capsys.readouterr().out
    parent, children = told(outputs)
    assert parent.info.status == "FINISHED"
    assert len(children) == 2


@pytest.mark.usefixtures("store")
def test_jobs_that_ended_before_mlflow_knew_it_are_mended_with_the_sweep(
    sweep: Sweeping, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    monkeypatch.setattr(Follower, "finish", lambda follower: setattr(follower, "given_up", True))
    assert sweep("lr=1e-4,1e-3") == 0
    parent, found = told(outputs)
    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    assert [run.info.status for run in (parent, *found)] == ["FINISHED"] * 3
    for child in found:
        run = Run(Path(child.data.tags["mlmx.folder"]))
        steps = [row["step"] for row in run.metrics() if "heldout/loss" in row]
        history = client.get_metric_history(child.info.run_id, "heldout/loss")
        assert [point.step for point in history] == steps
        assert "model" in {one.name for one in client.search_logged_models([child.info.experiment_id])}


@pytest.mark.usefixtures("store")
def test_a_job_is_brought_to_the_store_that_it_asked_for(sweep: Sweeping, outputs: Path):
    from mlflow import MlflowClient

    assert sweep("lr=1e-4", "tracking=local,none", "sweep.reuse=false") == 0
    _, children = told(outputs)
    assert [child.data.tags["mlmx.folder"] for child in children] == [str(the_sweep().folder / "0")], "the other: none"

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    assert sweep("lr=1e-3,1e-2", "tracking.experiment=b") == 0
    experiment = client.get_experiment_by_name("b").experiment_id
    [job] = [run for run in client.search_runs([experiment]) if run.data.tags["mlmx.folder"].endswith("/0")]
    client.update_run(job.info.run_id, "RUNNING")  # as if its ending had been lost
    assert sweep("lr=1e-3,1e-2", "tracking.experiment=a") == 0
    assert client.get_run(job.info.run_id).info.status == "FINISHED"
    models = client.search_logged_models([client.get_experiment_by_name("a").experiment_id, experiment])
    own = [(one.experiment_id, one.name) for one in models if one.source_run_id == job.info.run_id]
    assert sorted(own) == [(experiment, "epoch-1"), (experiment, "model")], "none is there twice"


@pytest.mark.usefixtures("store", "untaught")
def test_a_job_that_was_deleted_in_mlflow_keeps_no_other_from_it(
    sweep: Sweeping, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    from mlflow import MlflowClient

    assert sweep("lr=1e-4,1e-3") == 0
    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    first, second = sorted(told(outputs)[1], key=lambda run: run.data.tags["mlmx.folder"])
    client.delete_run(first.info.run_id)
    client.update_run(second.info.run_id, "RUNNING")
    capsys.readouterr()
    assert sweep("lr=1e-4,1e-3") == 0
    said = capsys.readouterr().out
    assert f"MLflow did not get all of {the_sweep().folder / '0'} (RuntimeError: run {first.info.run_id}" in said
    assert "how the sweep ended" not in said
    assert client.get_run(second.info.run_id).info.status == "FINISHED"


@pytest.mark.usefixtures("untaught")
@pytest.mark.parametrize("by_name", [True, False])
def test_a_sweep_that_is_being_run_is_refused(
    sweep: Sweeping, by_name: bool, trained: list[float], outputs: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["lr=1e-4,1e-3", "tracking=none"]
    assert sweep(*given) == 0
    folder = the_sweep().folder
    with process.held(folder):
        assert sweep(*given, *([f"hydra.sweep.dir={folder}"] if by_name else [])) == 2
    assert f"{folder}: is in use by process {os.getpid()}" in capsys.readouterr().err
    assert len(trained) == 2


@pytest.mark.long
@pytest.mark.usefixtures("store")
def test_a_grid_killed_in_its_third_job_finishes_when_it_is_issued_again(tiny: Path, corpus: Path, outputs: Path):
    grid = command(tiny, corpus, "lr=1e-4,1e-3", "mlm_probability=0.15,0.3", "epochs=4")
    process = started(grid, outputs, outputs.parent / "said.txt")

    def in_the_third() -> bool:
        return any(reached(folder / "2", 4) for folder in (outputs / "train").glob("*"))

    wait_until(in_the_third, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    before = the_sweep().runs()
    assert [run.status for run in before[:2]] == ["FINISHED", "FINISHED"]
    finished = [run.read_json("result.json") for run in before[:2]]

    assert main(grid) == 0
    runs = the_sweep().runs()
    assert [run.folder.name for run in runs] == ["0", "1", "2", "3"]
    assert [run.status for run in runs] == ["FINISHED"] * 4
    assert [run.read_json("result.json") for run in runs[:2]] == finished, "none is repeated"
    dials = [(run.config().lr, run.config().mlm_probability) for run in runs]
    assert dials == [(1e-4, 0.15), (1e-4, 0.3), (1e-3, 0.15), (1e-3, 0.3)]
    parent, children = told(outputs)
    assert (parent.info.status, len(children)) == ("FINISHED", 4)
    table = (the_sweep().folder / "table.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 1 + 4
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    for child in children:
        steps = [point.step for point in client.get_metric_history(child.info.run_id, "heldout/loss")]
        assert steps == [0, 2, 4, 6, 8]


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.usefixtures("store")
def test_a_sweep_that_is_interrupted_says_killed(number: int, code: int, tiny: Path, corpus: Path, outputs: Path):
    said = outputs.parent / "said.txt"
    process = started(command(tiny, corpus, "lr=1e-4,1e-3", "epochs=200"), outputs, said)
    wait_until(lambda: any(reached(folder / "0", 2) for folder in (outputs / "train").glob("*")), process)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert ended(process) == code
    assert the_sweep().about().status == "KILLED"
    assert [run.status for run in the_sweep().runs()] == ["KILLED"]
    parent, children = told(outputs)
    assert [run.info.status for run in (parent, *children)] == ["KILLED", "KILLED"]
    assert "to go on, give the same command again" in said.read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.usefixtures("store")
def test_doctor_marks_a_sweep_whose_process_is_gone(tiny: Path, corpus: Path, outputs: Path, capsys: Any):
    process = started(command(tiny, corpus, "lr=1e-4,1e-3", "epochs=200"), outputs, outputs.parent / "said.txt")
    wait_until(lambda: any(reached(folder / "0", 2) for folder in (outputs / "train").glob("*")), process)
    assert main(["doctor"]) == 0
    assert the_sweep().about().status == "RUNNING"
    process.kill()
    ended(process)
    assert main(["doctor"]) == 0
    assert the_sweep().about().status == "KILLED"
    assert (
        f"{the_sweep().folder}: a sweep; the same command keeps what is done: python -m mlmx" in capsys.readouterr().out
    )
    parent, _ = told(outputs)
    assert parent.info.status == "KILLED"
    sent = outputs / "mlartifacts" / parent.info.run_id / "artifacts" / "sweep.json"
    assert json.loads(sent.read_text())["status"] == "KILLED"


def test_a_value_that_is_wrong_is_refused_before_any_job(
    sweep: Sweeping, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    for swept, reason in {
        "lr=1e-4,-1": "job 1 of the sweep (lr=-1): lr=-1: must be a number greater than 0",
        "mlm_probability=interval(0.1,1.5)": "mlm_probability=interval(0.1,1.5): an interval has no list of values; a "
        "search takes it: hydra/sweeper=optuna",
    }.items():
        assert sweep(swept) == 2
        assert capsys.readouterr().err.startswith(f"mlmx: {reason}")
    assert not outputs.exists()


def test_a_folder_of_another_sweep_is_refused(sweep: Sweeping, outputs: Path, capsys: pytest.CaptureFixture[str]):
    folder = outputs / "train" / "here"
    Run(folder.parent).folder.mkdir(parents=True)
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"identity": "another"}))
    assert sweep("lr=1e-4,1e-3", f"hydra.sweep.dir={folder}") == 2
    assert "holds another sweep or run; choose another folder" in capsys.readouterr().err
