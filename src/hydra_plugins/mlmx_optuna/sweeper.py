"""``hydra/sweeper=optuna``: a sweep that searches, with current Optuna: Hydra's grammar, pruning, a study that is kept.

The published hydra-optuna-sweeper is bound to Optuna 2 and cannot do the latter two. Imported by Hydra at every start:
light. Hydra runs this file before it is in sys.modules, which dataclasses with postponed annotations do not survive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class OptunaSweeperConf:
    """``hydra.sweeper``; all keyword arguments of `OptunaSweeper`.

    ``params`` holds the space where the command line does not: ``{lr: "tag(log, interval(1e-5, 1e-3))"}``.
    """

    _target_: str = "hydra_plugins.mlmx_optuna.sweeper.OptunaSweeper"
    n_trials: int = 20
    n_jobs: int = 1
    sampler: str = "tpe"
    pruner: str = "median"
    startup_trials: int = 5
    seed: int = 42
    params: dict[str, str] | None = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="mlmx")


class OptunaSweeper(Sweeper):
    """Asks a study what to try, has the launcher run it, and tells the study what came out.

    Args:
        n_trials: in all, those of earlier issues of the same sweep included.
        n_jobs: trials asked for, and given to the launcher, at a time.
        sampler, pruner, startup_trials, seed: see `mlmx.sweeps.search`.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        params: Mapping[str, str] | None,
        sampler: str,
        pruner: str,
        startup_trials: int,
        seed: int,
    ) -> None:
        self.n_trials, self.n_jobs, self.params = n_trials, n_jobs, params or {}
        self.study = sampler, pruner, startup_trials, seed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from mlmx.sweeps.search import Search  # noqa: PLC0415 (Hydra imports this file at every start)

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        added = [f"{key}={value}" for key, value in self.params.items()]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        search = Search(folder, parser.parse_overrides([*added, *arguments]), *self.study)
        while trials := search.ask(min(self.n_jobs, self.n_trials - search.made())):
            batch: Sequence[Sequence[str]] = [search.overrides(trial) for trial in trials]
            self.validate_batch_is_legal(batch)
            returned = self.launcher.launch(batch, initial_job_idx=trials[0].number)
            for trial, job in zip(trials, returned, strict=True):
                if isinstance(job.return_value, Exception):
                    raise job.return_value
                search.tell(trial, job.return_value)
