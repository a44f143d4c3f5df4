"""What came in by ``--config-dir`` is kept with a run: whatever goes on with it needs the folder no more."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from mlmx.commands import doctor
from mlmx.commands.main import main
from mlmx.config.schema import Job, TrainConfig
from mlmx.runs.run import Run, all_runs
from mlmx.sweeps.sweep import all_sweeps

EXPERIMENT = """# @package _global_
defaults:
  - override /model: mine

chunk_size: 16
batch_size: 4
epochs: 1
"""


@pytest.fixture
def own(tmp_path: Path, tiny: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own, in a working folder: an experiment that uses a model, datasets, and what nobody asks
    for."""
    folder = tmp_path / "here" / "own configs"
    model, files = f"name: pretrained\npath: {tiny}\n", f"name: files\npath: {corpus}\n"
    options = {
        "model/mine": f"defaults: [base]\npath: {tiny}  # the small one\n",
        "model/base": model,
        "experiment/night": EXPERIMENT,
        "dataset/ours": files + "heldout: theirs\nallow_overlap: true\ntrain_chunks: 8\neval_chunks: 2\n",
        "dataset/theirs": files.replace(str(corpus), "good.txt"),
        "model/unused": "a: [",
    }
    for name, text in options.items():
        (folder / f"{name}.yaml").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    (folder.parent / "good.txt").write_text("".join(f"A great film it is, the {n}th.\n" for n in range(100)))
    monkeypatch.chdir(folder.parent)
    return folder


USED = ["dataset/ours.yaml", "dataset/theirs.yaml", "experiment/night.yaml", "model/base.yaml", "model/mine.yaml"]
ASKED = ["experiment=night", "dataset=ours", "heldout.documents=4"]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def interrupted(own: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that was made with the folder, and ended before its time; the folder is gone since."""
    with monkeypatch.context() as patched:
        patched.setattr("mlmx.commands.train.fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["train", "--config-dir", "own configs", *ASKED]) == 130
    [run] = all_runs()
    assert files_below(run.folder / "conf") == USED
    for name in USED:
        assert (run.folder / "conf" / name).read_text() == (own / name).read_text()
    shutil.rmtree(own)
    return run


def test_a_run_goes_on_without_the_folder_it_was_made_with(interrupted: Run, capfd: pytest.CaptureFixture[str]):
    made = interrupted.config()
    assert doctor.describe(interrupted, found_dead=False).endswith(f"mlmx train resume={interrupted.folder}")
    assert main(["train", f"resume={interrupted.folder}"]) == 0, capfd.readouterr().err
    assert interrupted.status == "FINISHED"
    assert interrupted.config() == made
    assert files_below(interrupted.folder / "conf") == USED
    assert main(["train", "resume=last", "epochs=2", "resume.allow=[epochs]"]) == 2, "none is unfinished"
    assert main(["train", f"resume={interrupted.folder}", "epochs=2", "resume.allow=[epochs]"]) == 0
    assert main(["evaluate", "run=last"]) == 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Job]]:
    """What reaches `train`, which does not train here."""
    seen: list[tuple[TrainConfig, Job]] = []
    monkeypatch.setattr("mlmx.commands.train.train", lambda cfg, job, *more: seen.append((cfg, job)))
    return seen


def test_what_is_on_record_of_a_run_makes_it_again(interrupted: Run, asked: list[tuple[TrainConfig, Job]]):
    command = interrupted.read_json("mlflow.json")["tags"]["mlmx.command"]
    assert shlex.split(command)[:3] == ["python", "-m", "mlmx"]
    assert main(shlex.split(command)[3:]) == 0
    assert main(["train", *yaml.safe_load((interrupted.folder / "overrides.yaml").read_text())]) == 0
    assert [config for config, _ in asked] == [interrupted.config()] * 2
    assert [sorted(job.own) for _, job in asked] == [USED] * 2


@pytest.mark.long
def test_a_sweep_is_issued_again_without_the_folder(own: Path, outputs: Path):
    given = ["--config-dir", "own configs", *ASKED, "tracking=none", "seed=1,2", "hydra/launcher=joblib"]
    assert main(["train", "-m", *given, "hydra.launcher.n_jobs=2"]) == 0
    [sweep] = all_sweeps()
    assert files_below(sweep.folder / "conf") == USED
    searched = OmegaConf.load(sweep.folder / "multirun.yaml").hydra.overrides.hydra[-1]
    assert searched.startswith(f"hydra.searchpath=['plain://{sweep.folder}/conf'"), "where jobs are composed elsewhere"
    before = {run.folder: run.result() for run in all_runs()}
    assert [run.status for run in all_runs()] == ["FINISHED"] * 2
    shutil.rmtree(own)
    assert main(shlex.split(sweep.about().command)[3:]) == 0
    assert {run.folder: run.result() for run in all_runs()} == before, "what is done is kept"
    assert len(all_sweeps()) == 1
    job = all_runs()[0]
    assert main(["train", f"resume={job.folder}", "epochs=2", "resume.allow=[epochs]"]) == 0, "a job is a run"


def test_a_search_keeps_every_option_that_it_may_come_to(own: Path, outputs: Path):
    for name in ("first", "second", "third"):
        shutil.copy(own / "dataset" / "theirs.yaml", own / "dataset" / f"{name}.yaml")
    given = ["train", "-m", "--config-dir", "own configs", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3"]
    given += ["experiment=night", "dataset=ours", "heldout.documents=4", "tracking=none", "hydra.sweeper.seed=5"]
    assert main([*given, "heldout.dataset=choice(first,second,third)", "lr=interval(1e-5,1e-3)"]) == 0
    [sweep] = all_sweeps()
    kept = {f"dataset/{name}.yaml" for name in ("first", "second", "third")}
    assert kept <= set(files_below(sweep.folder / "conf"))
    assert [run.status for run in sweep.runs()] == ["FINISHED"] * 3


@pytest.mark.parametrize("flag", [["--config-dir", "own configs"], ["hydra.searchpath=['file://own configs']"]])
def test_held_out_documents_are_named_by_a_yaml_of_ones_own(
    flag: list[str], own: Path, asked: list[tuple[TrainConfig, Job]], capsys: pytest.CaptureFixture[str]
):
    base = ["train", *flag, "model=scratch", "dataset=imdb_packaged", "tracking=none"]
    assert main([*base, "heldout.dataset=theirs"]) == 0
    assert main([*base, "heldout.dataset=rotten_tomatoes_packaged"]) == 0
    [(mine, job), (shipped, nothing)] = asked
    assert mine.heldout.dataset == {"name": "files", "path": "good.txt"}
    assert (shipped.heldout.dataset, nothing.own) == ("rotten_tomatoes_packaged", {})
    assert list(job.own) == ["dataset/theirs.yaml"]
    assert main([*base, "heldout.dataset=thers"]) == 2
    assert "did you mean theirs?" in capsys.readouterr().err


def test_a_secret_that_would_be_copied_is_refused(
    own: Path, asked: list[Any], outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_TOKEN", "Canary-7f3a9e51c0")
    for name in ("model/mine.yaml", "dataset/theirs.yaml"):
        text = (own / name).read_text()
        (own / name).write_text(text + "# Canary-7f3a9e51c0\n")
        for more in ([], ["-m", "seed=1,2"]):
            assert main(["train", "--config-dir", "own configs", *ASKED, *more]) == 2
            told = capsys.readouterr().err
            assert told.startswith(f"mlmx: {name}: holds the value of HF_TOKEN, and is copied")
            assert "Canary" not in told
        (own / name).write_text(text)
    assert (asked, os.path.lexists(outputs)) == ([], False)


def test_what_lies_outside_the_folder_is_not_taken(own: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]):
    shutil.move(own / "model/mine.yaml", own.parent / "mine.yaml")
    for outside in ("model=../../mine", f"model={own.parent}/mine"):
        assert main(["train", "--config-dir", "own configs", outside, "dataset=imdb_packaged"]) == 2
    assert "mine.yaml: lies outside" in capsys.readouterr().err
    assert asked == []
