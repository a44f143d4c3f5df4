"""A search over dials by Optuna: its study, what a trial is told and asks, and the plots of it.

The study lies in the sweep's folder (``study.db``), so a search that was ended goes on when it is issued again. A
trial's number is the number of its job. Optuna is an extra and imported where it is used.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig

from mlmx.config.errors import RequestError, did_you_mean, require
from mlmx.runs.metrics_file import loss_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial

STUDY_FILE = "study.db"
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler", "qmc": "QMCSampler"}
PRUNERS = ("median", "hyperband", "none")
KILLED, PRUNED = "killed", "pruned"  # attributes of a trial


def require_possible(sweeper: DictConfig) -> None:
    """Refuse options of ``hydra.sweeper`` that no search can be made with."""
    for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        value = str(sweeper[name])
        listed = f"choose one of {', '.join(known)}{did_you_mean(value, known)}"
        require(value in known, f"hydra.sweeper.{name}={value}: {listed}")
    for name in ("n_trials", "n_jobs"):
        require(sweeper[name] >= 1, f"hydra.sweeper.{name}={sweeper[name]}: must be at least 1")
    if importlib.util.find_spec("optuna") is None:
        raise RequestError("hydra/sweeper=optuna: needs Optuna, which is not installed; pip install 'mlmx[optuna]'")


def _study(folder: Path) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the jobs say what happens
    storage = f"sqlite:///{folder / STUDY_FILE}"
    return optuna.create_study(storage=storage, study_name="mlmx", direction="minimize", load_if_exists=True)


class Search:
    """A study and its space: of the overrides of the command line and the config the swept ones.

    ``startup_trials`` come before the sampler learns from what it has seen, and the pruner may end a run; ``seed`` is
    the sampler's, and a search that goes on draws new numbers.
    """

    def __init__(
        self, folder: Path, overrides: Sequence[Override], sampler: str, pruner: str, startup_trials: int, seed: int
    ) -> None:
        import optuna

        self.space = {str(o.key_or_group): distribution(o) for o in overrides if o.is_sweep_override()}
        self.keys = {str(o.key_or_group): o.get_key_element() for o in overrides}
        self.fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
        require(bool(self.space), "hydra/sweeper=optuna: nothing to search; give a dial several values or an interval")
        self.study = _study(folder)
        drawn = len(self.study.get_trials(deepcopy=False))
        more = {"n_startup_trials": startup_trials} if sampler in ("tpe", "gp") else {}
        self.study.sampler = getattr(optuna.samplers, SAMPLERS[sampler])(seed=seed + drawn, **more)
        self.study.pruner = _pruner(pruner, startup_trials)
        # Those of a process that was killed are tried again first, with the same values.
        for trial in _trials(self.study, "RUNNING"):
            _trial(self.study, trial.number).set_user_attr(KILLED, True)
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(trial.params)

    def made(self) -> int:
        """Trials that have come to an end of their own."""
        trials = self.study.get_trials(deepcopy=False)
        return sum(trial.state.is_finished() and not trial.user_attrs.get(KILLED) for trial in trials)

    def ask(self, number: int) -> list[Trial]:
        """The next trials; none where ``number`` is not positive."""
        return [self.study.ask(self.space) for _ in range(number)]

    def overrides(self, trial: Trial) -> list[str]:
        """The job of a trial."""
        return [*self.fixed, *(f"{self.keys[name]}={value}" for name, value in trial.params.items())]

    def tell(self, trial: Trial, value: object) -> None:
        """What came out; a trial without a finite number failed, and that is all."""
        from optuna.trial import TrialState

        if not isinstance(value, (int, float)) or not math.isfinite(value):
            self.study.tell(trial, state=TrialState.FAIL)
        elif self.study.get_trials(deepcopy=False)[trial.number].user_attrs.get(PRUNED):
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, value)


def distribution(override: Override) -> BaseDistribution:
    """Optuna's form of Hydra's: ``choice``, ``range``, ``interval``; ``tag(log, …)`` counts in orders of magnitude."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value, line = override.value(), override.input_line
    log = isinstance(value, (IntervalSweep, RangeSweep)) and "log" in value.tags
    try:
        if isinstance(value, IntervalSweep):
            assert value.start is not None
            assert value.end is not None
            if isinstance(value.start, int) and isinstance(value.end, int):
                return IntDistribution(value.start, value.end, log=log)
            return FloatDistribution(value.start, value.end, log=log)
        if isinstance(value, RangeSweep) and not value.shuffle:
            items = list(value.range())
            if all(isinstance(item, int) for item in items):
                return IntDistribution(int(items[0]), int(items[-1]), step=1 if log else int(value.step), log=log)
        return CategoricalDistribution([*override.sweep_string_iterator()])
    except ValueError as error:
        raise RequestError(f"{line}: is no space to search ({error})") from error


def _pruner(name: str, startup_trials: int) -> BasePruner:
    from optuna import pruners

    if name == "median":
        return pruners.MedianPruner(n_startup_trials=startup_trials)
    return pruners.HyperbandPruner() if name == "hyperband" else pruners.NopPruner()


def stop_early(
    folder: Path, number: int, pruner: str, startup_trials: int
) -> Callable[[float, Mapping[str, float]], bool]:
    """Reports a trial's scores, epoch by epoch, to the study below ``folder`` and asks whether it is to go on."""
    study = _study(folder)
    study.pruner = _pruner(pruner, startup_trials)
    trial = _trial(study, number)

    def reported(epoch: float, scores: Mapping[str, float]) -> bool:
        value = loss_of(scores)
        if epoch <= 0 or not math.isfinite(value):
            return False
        trial.report(value, round(epoch))
        if stop := trial.should_prune():
            trial.set_user_attr(PRUNED, True)
        return stop

    return reported


def _trial(study: Study, number: int) -> Trial:
    from optuna import Trial

    # Optuna has no public way to the trial of another process.
    return Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)  # noqa: SLF001 (see above)


def plot(folder: Path, into: Path) -> list[Path]:
    """How the search went, and which dials mattered, as PNG files; empty where there was no search or too little."""
    if not (folder / STUDY_FILE).is_file():
        return []
    study = _study(folder)
    if len(_trials(study, "COMPLETE")) < 2:
        return []
    from mlmx.comparison import plots  # noqa: PLC0415 (imports matplotlib)

    written = []
    for name, kind in {"history": _plot_history, "importance": _plot_importance, "epochs": _plot_epochs}.items():
        with plots.literally():
            figure = plots.new_figure()
            axes = plots.styled(figure.add_subplot())
            kind(axes, study, plots.COLOURS)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False)
            written.append(plots.save(figure, into / f"search_{name}.png"))
    return written


def _trials(study: Study, state: str) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState[state],))


def _plot_history(axes: Axes, study: Study, colours: Sequence[str]) -> None:
    numbers, losses = zip(*((trial.number, trial.value) for trial in _trials(study, "COMPLETE")), strict=True)
    axes.set(xlabel="trial", ylabel="loss")
    axes.plot(numbers, losses, "o", color=colours[0], label="loss")
    axes.step(numbers, list(itertools.accumulate(losses, min)), color=colours[1], where="post", label="best so far")
    axes.locator_params(axis="x", integer=True)


def _plot_importance(axes: Axes, study: Study, colours: Sequence[str]) -> None:
    from optuna.importance import get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few trials tell little
        shares = sorted(get_param_importances(study).items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in shares], [share for _, share in shares], color=colours[0])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlabel="importance for the loss, 1 in all")


def _plot_epochs(axes: Axes, study: Study, colours: Sequence[str]) -> None:
    best, whole = study.best_trial.number, _trials(study, "COMPLETE")
    axes.set(xlabel="epoch", ylabel="loss")
    for label, style, colour, trials in (
        ("ended early", ":", colours[5], _trials(study, "PRUNED")),
        ("others", "-", colours[0], [trial for trial in whole if trial.number != best]),
        ("best", "-o", colours[1], [trial for trial in whole if trial.number == best]),
    ):
        curves = [sorted(trial.intermediate_values.items()) for trial in trials if trial.intermediate_values]
        for place, curve in enumerate(curves):
            axes.plot(*zip(*curve, strict=True), style, color=colour, label="_" if place else label)
    axes.locator_params(axis="x", integer=True)
