"""A search by Optuna: the space is Hydra's, bad trials end early or fail alone, and it goes on when issued again."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from mlmx.commands.main import main
from mlmx.config.schema import TrainConfig
from mlmx.sweeps import search
from mlmx.sweeps.sweep import all_sweeps
from tests.support.processes import ended, reached, started, wait_until
from tests.support.sweeps import command, told

SPACE = ("lr=tag(log, interval(1e-5, 1e-2))", "mlm_probability=choice(0.15,0.3)")
OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.startup_trials=2")


def trials() -> Sequence[FrozenTrial]:
    [sweep] = all_sweeps()
    return optuna.load_study(study_name="mlmx", storage=f"sqlite:///{sweep.folder / 'study.db'}").get_trials()


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Instead of training, a job gives the next of these; those it has given are taken out."""
    values: list[Any] = []

    def train(cfg: TrainConfig, job: Any, stop_early: Any) -> float:
        value = values.pop(0)
        if isinstance(value, Exception):
            raise value
        if isinstance(value, float):
            return value
        for epoch, loss in enumerate(value):
            if stop_early(float(epoch), {"heldout/loss": loss}):
                break
        return float(loss)

    monkeypatch.setattr("mlmx.commands.train.train", train)
    return values


@pytest.mark.parametrize(
    ("given", "distribution"),
    [
        ("lr=interval(1e-5,1e-3)", FloatDistribution(1e-5, 1e-3)),
        ("lr=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("chunk_size=int(interval(64,128))", IntDistribution(64, 128)),
        ("chunk_size=range(64,257,64)", IntDistribution(64, 256, step=64)),
        ("chunk_size=64,128", CategoricalDistribution(["64", "128"])),
        ("model=choice(minilm,scratch)", CategoricalDistribution(["minilm", "scratch"])),
    ],
)
def test_the_space_is_written_in_hydras_grammar(given: str, distribution: BaseDistribution):
    [override] = OverridesParser.create().parse_overrides([given])
    assert search.distribution(override) == distribution


def test_failed_and_nan_trials_fail_alone_and_bad_ones_are_ended_early(
    losses: list[Any], tiny: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
):
    good, bad = [9.0, 5.0, 4.0, 3.0], [9.0, 8.0, 8.0, 8.0]
    losses += [good, RuntimeError("no"), math.nan, good, bad, 2.5]
    assert main(command(tiny, corpus, *SPACE, *OPTUNA, "tracking=none", "epochs=3")) == 1
    states = [trial.state for trial in trials()]
    assert states == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.COMPLETE,
    ]
    assert trials()[0].intermediate_values == {1: 5.0, 2: 4.0, 3: 3.0}, "the baseline is no epoch of training"
    assert trials()[4].intermediate_values == {1: 8.0}
    assert "(lr=" in capsys.readouterr().err


@pytest.mark.usefixtures("store")
def test_a_pruned_run_stops_training_and_says_so_everywhere(
    tiny: Path, corpus: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(search, "_pruner", lambda *_: optuna.pruners.ThresholdPruner(upper=0.0))  # all are too bad
    more = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "epochs=3")
    assert main(command(tiny, corpus, *SPACE, *more)) == 0
    assert [trial.state for trial in trials()] == [TrialState.PRUNED]
    [sweep] = all_sweeps()
    [run] = sweep.runs()
    assert [row["epoch"] for row in run.metrics()][-1] == 1.0, "of three"
    assert (run.status, run.result().pruned) == ("FINISHED", True)
    assert "FINISHED, pruned" in (sweep.folder / "table.md").read_text()
    _, [child] = told(outputs)
    assert child.data.tags["mlmx.pruned"] == "true"


def test_a_search_goes_on_when_it_is_issued_again(losses: list[Any], tiny: Path, corpus: Path):
    losses += [3.0, 2.0, 1.0, 0.5]
    for n_trials, made in ((2, 2), (2, 2), (4, 4)):
        more = ("hydra/sweeper=optuna", f"hydra.sweeper.n_trials={n_trials}", "tracking=none")
        assert main(command(tiny, corpus, *SPACE, *more)) == 0
        assert len(trials()) == made
    assert len({trial.params["lr"] for trial in trials()}) == 4, "it does not draw the same numbers again"


@pytest.mark.long
@pytest.mark.usefixtures("store")
def test_a_search_killed_in_a_trial_goes_on_with_it(tiny: Path, corpus: Path, outputs: Path):
    given = command(tiny, corpus, *SPACE, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "epochs=4")
    process = started(given, outputs, outputs.parent / "said.txt")
    wait_until(lambda: any(reached(folder / "1", 4) for folder in (outputs / "train").glob("*")), process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    ended(process)
    assert main(given) == 0
    states = [trial.state for trial in trials()]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert trials()[2].params == trials()[1].params
    [sweep] = all_sweeps()
    assert [run.folder.name for run in sweep.runs()] == ["0", "1", "3"], "the second was gone on with, in its folder"
    assert [run.status for run in sweep.runs()] == ["FINISHED"] * 3
    parent, children = told(outputs)
    assert (parent.info.status, len(children)) == ("FINISHED", 3)
    plots = {path.name for path in (sweep.folder / "plots").iterdir()}
    assert {"search_history.png", "search_importance.png", "search_epochs.png"} <= plots


def test_the_plots_of_a_search_show_what_it_did_and_touch_no_state(tmp_path: Path):
    import matplotlib as mpl

    assert search.plot(tmp_path, tmp_path) == [], "no search"
    before = dict(mpl.rcParams)
    study = search._study(tmp_path)
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    for number in range(4):
        trial = study.ask({"lr": FloatDistribution(1e-5, 1e-3, log=True), "$\\frac{$": CategoricalDistribution([1, 2])})
        if number % 2:
            trial.report(3.0 + number, 1)
        if number == 3:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, 2.0 + number)
        if number == 0:
            assert search.plot(tmp_path, tmp_path) == [], "too little"
    paths = search.plot(tmp_path, tmp_path)
    assert [path.name for path in paths] == ["search_history.png", "search_importance.png", "search_epochs.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["hydra.sweeper.sampler=tpee", *SPACE], "hydra.sweeper.sampler=tpee: choose one of tpe, random, gp, qmc"),
        (["hydra.sweeper.pruner=x", *SPACE], "hydra.sweeper.pruner=x: choose one of median, hyperband, none"),
        (
            ["mlm_probability=interval(0.1,1.5)"],
            "job 1 of the sweep (mlm_probability=1.5): mlm_probability=1.5: the share",
        ),
        (["hydra.sweeper.n_trials=0", *SPACE], "hydra.sweeper.n_trials=0: must be at least 1"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(
    given: list[str], reason: str, tiny: Path, corpus: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(command(tiny, corpus, "hydra/sweeper=optuna", *given)) == 2
    assert capsys.readouterr().err.startswith(f"mlmx: {reason}")
    assert not outputs.exists()
