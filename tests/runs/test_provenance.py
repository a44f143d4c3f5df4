"""What a run was made with is beside it and in MLflow: packages, uncommitted code, the machine, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.config.schema import TrainConfig
from mlmx.runs import provenance
from mlmx.runs.run import Run, begin_run
from mlmx.tracking import follower, system
from mlmx.tracking.store import local, server
from tests.support.tracked import caught_up, history, logged, of, opened, tracker, until
from tests.support.trainings import command


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository that the code is taken to be in, with one commit."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "file.py").write_text("one = 1\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *step], check=True)
    monkeypatch.setattr(provenance, "checkout", lambda: checkout)
    yield forget(checkout)
    forget(checkout)


def forget(checkout: Path) -> Path:
    """What was asked once is asked again."""
    for asked in (provenance.code, provenance.changes, provenance.packages):
        asked.cache_clear()
    return checkout


def kept(run: Run) -> set[str]:
    with provenance.kept(run):
        pass
    return {path.name for path in run.folder.iterdir()}


def test_code_that_is_committed_needs_no_diff(code: Path, tmp_path: Path):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    assert kept(run) == {"packages.txt"}
    assert provenance.tags()["mlmx.git_dirty"] == "false"


def test_what_no_commit_has_is_kept_without_secrets(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-mine")
    (code / "file.py").write_text("one = 'a-secret-of-mine'\ntwo = 2\n")
    (code / "new.py").write_text("three = 3\n")
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    assert kept(run) == {"packages.txt", "git.diff"}
    found = (run.folder / "git.diff").read_text()
    assert found.startswith("# not known to git: new.py\ndiff --git a/file.py b/file.py\n")
    assert "-one = 1\n+one = '***'\n+two = 2\n" in found
    (code / "file.py").write_text("one = 2\n")
    assert kept(run) == {"packages.txt", "git.diff"}, "git is asked once in a process"
    assert (run.folder / "git.diff").read_text() == found


def test_a_diff_is_bounded_and_says_so(code: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "MOST_DIFF_BYTES", 1000)
    (code / "file.py").write_text("".join(f"number = {n}\n" for n in range(10_000)))
    found = provenance.changes()
    assert len(found) < 1100
    assert found.endswith("\n# cut here: more than 1,000 bytes\n")
    assert found.count("+number") > 20


def test_a_diff_runs_nothing_that_settings_name(code: Path, tmp_path: Path):
    for setting in ("diff.external", "core.pager"):
        subprocess.run(["git", "-C", str(code), "config", setting, f"touch {tmp_path / 'ran'}"], check=True)
    (code / "file.py").write_text("two = 2\n")
    assert "+two = 2" in provenance.changes()
    assert not (tmp_path / "ran").exists()


def test_packages_are_listed_as_pip_freezes_them(tmp_path: Path):
    head, *lines = provenance.packages().splitlines()
    assert head.startswith("# Python 3.")
    assert {f"{name}=={version(name)}" for name in ("torch", "mlflow", "numpy", "pytest")} <= set(lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0].lower())
    assert len(lines) == len(set(lines)) > 50


def test_what_a_run_was_begun_with_stays_when_it_is_resumed_with_other(tmp_path: Path):
    run = Run(tmp_path)
    run.write_text("packages.txt", "numpy==1.0\n")
    assert kept(run) >= {"packages.txt", "packages.resumed.txt"}
    assert (tmp_path / "packages.txt").read_text() == "numpy==1.0\n"
    assert (tmp_path / "packages.resumed.txt").read_text() == provenance.packages()


def test_a_run_does_without_what_cannot_be_kept(tmp_path: Path, said: pytest.LogCaptureFixture):
    assert not (tmp_path / "gone").exists()
    with provenance.kept(Run(tmp_path / "gone")):
        pass
    assert "what it was made with could not be kept (" in said.text


def test_the_machine_is_told_in_words_and_numbers(monkeypatch: pytest.MonkeyPatch):
    gpus = [SimpleNamespace(name="NVIDIA H100", total_memory=size * 2**30) for size in (79, 80)]
    cuda = SimpleNamespace(device_count=lambda: 2, get_device_properties=gpus.__getitem__)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(provenance, "memory_bytes", lambda: 31 * 2**30 + 2**29)
    found = provenance.machine()
    assert found["mlmx.hardware"].startswith("NVIDIA H100 (79 GiB) · NVIDIA H100 (80 GiB) · ")
    assert found["mlmx.hardware"].endswith(" · 32 GiB")
    numbers = {key.removeprefix("mlmx."): value for key, value in found.items() if key != "mlmx.hardware"}
    assert numbers == {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gib": "31.5",
        "gpus": "2",
        "gpu_memory_gib": "79.0",
    }


# ---------------------------------------------------------------------------------------- system metrics


def test_system_metrics_are_in_mlflow_alone(store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(system, "EVERY_SECONDS", 0.05)
    at = local(system_metrics=True)
    made = tracker(outputs / "run", at)
    for step in range(1, 31):
        made.log(step, step / 10, {"train/loss": 1 / step})
        time.sleep(0.01)
    assert made.system is not None
    until(lambda: made.system is not None and not made.system.waiting)
    made.finish("FINISHED", {})
    made.system.thread.join()
    assert {name for row in made.run.metrics() for name in row} == {"step", "epoch", "time", "train/loss"}
    assert "system/" not in json.dumps(made.run.read_json("result.json"))
    client = MlflowClient(at.uri)
    names = {name for name in client.get_run(made.run_id or "").data.metrics if name.startswith("system/")}
    assert names >= {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
        "system/process_memory_usage_megabytes",
    }
    points = client.get_metric_history(made.run_id or "", "system/process_memory_usage_megabytes")
    assert len({point.step for point in points}) > 3
    assert all(10 < point.value < 1e6 for point in points)
    assert [point for point in history(at, made) if not point[0].startswith("system/")] == logged(made)


def test_a_run_samples_nothing_unless_asked(store: Path, outputs: Path):
    made = tracker(outputs / "run", local())
    made.finish("FINISHED", {})
    assert made.system is None


def test_the_machine_is_sampled_on_while_a_device_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(system, "EVERY_SECONDS", 0.01)
    values: Iterator[Any] = iter([{"a": 1.0}, None, {"a": 2.0}])
    monkeypatch.setattr(system, "sample", lambda: dict(next(values)))
    sampler = system.SystemMetrics(0, lambda: None)
    until(lambda: len(sampler.waiting) == 2)
    sampler.ended.set()
    sampler.thread.join()
    assert [found for *_, found in sampler.waiting] == [{"a": 1.0}, {"a": 2.0}]


def test_a_gpu_without_nvidias_package_tells_its_memory(monkeypatch: pytest.MonkeyPatch):
    memory = {"is_initialized": lambda: True, "device_count": lambda: 1, "mem_get_info": lambda i: (10**9, 4 * 10**9)}
    monkeypatch.setitem(system.sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(**memory)))
    found = {name: value for name, value in system.sample().items() if name.startswith("gpu")}
    assert found == {"gpu_0_memory_usage_megabytes": 3000.0, "gpu_0_memory_usage_percentage": 75.0}


# ---------------------------------------------------------------------------------------- the description


def note(outputs: Path) -> str:
    return str(of(outputs)[1].data.tags["mlflow.note.content"])


def test_a_real_run_tells_all_of_it(store: Path, tiny: Path, corpus: Path, outputs: Path):
    folder = outputs / "train" / "run"
    more = ["trainer.save_steps=10", "tracking=local", "note=For the record."]
    assert main(command(tiny, corpus, folder, *more)) == 0
    client, run = of(outputs)
    first = {name: row[name] for row in Run(folder).metrics() if row["step"] == 0 for name in row}
    last = Run(folder).result().metrics
    text = note(outputs)
    assert text.startswith("`python -m mlmx train ")
    assert "\n\nFor the record.\n\n**FINISHED**\n\n| | before training | after |\n|---|---|---|\n" in text
    for name in ("heldout/loss", "eval/accuracy"):
        assert f"| {name} | {first[name]:,.5g} | {last[name]:,.5g} |\n" in text
    assert f"\n    python -m mlmx predict run={folder} 'text=This is a great [MASK].'\n" in text
    assert text.endswith("    python -m mlmx compare experiment=mlmx")
    assert "packages.txt" in {file.path for file in client.list_artifacts(run.info.run_id)}
    contexts = {tag.value for given in run.inputs.dataset_inputs for tag in given.tags}
    assert contexts == {"training", "validation", "testing"}
    assert {"mlmx.cores", "mlmx.memory_gib"} <= set(run.data.tags)


OUTCOME = "**KILLED**"


@pytest.mark.parametrize("edited", [False, True])
def test_a_description_follows_the_run_until_a_person_edits_it(edited: bool, store: Path, outputs: Path):
    folder = outputs / "train" / "run"
    made = opened(folder)
    until(lambda: caught_up(made))
    assert note(outputs) == "a note"
    if edited:
        of(outputs)[0].set_tag(made.run_id, "mlflow.note.content", "mine")
    made.annotate(OUTCOME)
    made.finish("KILLED", {}, resumable=True)
    assert note(outputs) == ("mine" if edited else f"a note\n\n{OUTCOME}")

    again = opened(folder)
    until(lambda: caught_up(again))
    assert note(outputs) == ("mine" if edited else "a note"), "it is no longer one that was killed"
    again.annotate("**FINISHED**")
    again.finish("FINISHED", {})
    assert note(outputs) == ("mine" if edited else "a note\n\n**FINISHED**")


def test_a_description_that_mlflow_missed_is_sent_later(store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch):
    folder = outputs / "train" / "run"
    made = opened(folder)
    until(lambda: caught_up(made))
    with contextlib.ExitStack() as away, monkeypatch.context() as patch:
        away.callback(lambda: None)
        patch.setattr(follower, "PATIENCE_SECONDS", 0.1)
        patch.setattr("mlmx.tracking.mlflow_run.MlflowRun.describe", lambda *given: 1 / 0)
        made.annotate("**FINISHED**")
        made.finish("FINISHED", {})
    assert note(outputs) == "a note"
    assert main(["sync", "run=last"]) == 0
    assert note(outputs) == "a note\n\n**FINISHED**"


def test_a_run_that_can_go_on_says_how(outputs: Path):
    from mlmx.commands.describe import outcome

    run = begin_run(outputs / "train" / "a run", TrainConfig(), (), {})
    text = outcome(run, "KILLED", True, {}, {"train/loss": 1.0}, None)
    assert text == f"**KILLED**\n\n    python -m mlmx train resume='{run.folder}'"
    at = server(uri="http://127.0.0.1:5000", experiment="mine")
    text = outcome(run, "FINISHED", False, {}, {}, at)
    assert text.endswith("compare tracking=server tracking.uri=http://127.0.0.1:5000 experiment=mine")
