"""One composition for each job, and what Hydra's own node may say in it.

Hydra says well what it refuses, but on some values it breaks (a list of lists as an option, an integer of 5,000
digits): these are refused by name.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mlmx.config.errors import RequestError, require
from mlmx.config.paths import is_below_outputs, outputs_dir
from mlmx.config.redaction import entries


def composed(compose: Callable[[list[str]], DictConfig], overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes of these overrides, its own node included; that on which it breaks is refused by name."""
    try:
        return compose(list(overrides))
    except (RequestError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        culprit = " ".join(overrides)
        for one in overrides:
            try:
                compose([one])
            except (RequestError, HydraException, OmegaConfBaseException):
                continue
            except Exception:  # noqa: BLE001 (of any kind: Hydra breaks)
                culprit = one
                break
        raise RequestError(f"{culprit}: cannot be composed ({type(error).__name__}: {error})") from error


class ComposedOnce(ConfigLoaderImpl):
    """Hydra's loader, from which a job of a sweep gets the config that was composed to check it.

    Sweepers and launchers would have it composed again, twice for every job, of YAML that may have changed since. In a
    process of a launcher's it composes anew: to send the configs of all jobs to each of them would cost more.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.jobs: dict[tuple[str, ...], DictConfig] = {}
        self.folder: Path | None = None  # of the sweep, once it is decided

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"jobs": {}}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        key = tuple(sweep_overrides)
        if key not in self.jobs:
            self.jobs[key] = super().load_sweep_config(master_config, sweep_overrides)
        found = copy.deepcopy(self.jobs[key])  # each job's own: Hydra writes its number into it
        if self.folder is not None:
            found.hydra.sweep.dir = str(self.folder)
        return found


CORE = "hydra._internal.core_plugins"
# Where Hydra's node names code, and what may stand there: its own launcher and sweeper, and installed plugins.
TARGETS = {
    "launcher._target_": rf"{CORE}\.basic_launcher\.BasicLauncher|hydra_plugins\.\w+\.\w+\.\w*Launcher",
    "sweeper._target_": rf"{CORE}\.basic_sweeper\.BasicSweeper|hydra_plugins\.\w+\.\w+\.\w*Sweeper",
    "sweeper.sampler._target_": r"optuna\.samplers\.\w+Sampler",
}
# Lists and mappings that are empty in Hydra's defaults, and why they stay so.
EMPTY = {
    "callbacks": "a config names no code",
    "job.env_copy": "the environment may hold secrets, and Hydra writes what it copies to multirun.yaml",
    "job.env_set": "a config sets no environment variable; export it before the command",
}


def require_confined(command: str, composed: DictConfig, number: int = 0, multirun: bool = False) -> None:
    """Refuse a job whose ``hydra`` node could write outside outputs/, run code or change the process."""
    node = composed.hydra
    if not multirun and getattr(node.mode, "name", None) == "MULTIRUN":
        raise RequestError("hydra.mode=MULTIRUN: is not taken from a config; a sweep is asked for by -m")
    for key, reason in EMPTY.items():
        require(not OmegaConf.select(node, key), f"hydra.{key}: is not taken; {reason}")
    require(node.output_subdir is None, "hydra.output_subdir: is not taken; a run writes its own config.yaml")
    require(not node.job.chdir, "hydra.job.chdir: is not taken; a run stays in the folder it was started in")
    for name in ("job_logging", "hydra_logging"):
        chosen = OmegaConf.select(node, name)
        if chosen is None or chosen.get("root") is not None:
            raise RequestError(f"hydra/{name}: is not taken; a run writes its own train.log (leave it at none)")
    own = "Hydra's own launcher and sweeper, and its installed plugins, are"
    for path, key, target in entries(OmegaConf.to_container(node, resolve=False)):
        is_own = key != "_target_" or (path in TARGETS and re.fullmatch(TARGETS[path], str(target)) is not None)
        require(is_own, f"hydra.{path}={target}: is not taken; {own}")
    with open_dict(composed):
        composed.hydra.job.num, composed.hydra.job.id = number, str(number)
    with _as_hydra_config(composed):  # for ${hydra:…} in a folder's name
        run, sweep, subdir = (str(OmegaConf.select(node, key)) for key in ("run.dir", "sweep.dir", "sweep.subdir"))
    require_folder(command, "hydra.run.dir", run)
    require_below_outputs("hydra.sweep.dir", sweep)
    require_below_outputs("hydra.sweep.subdir", str(Path(sweep) / subdir), subdir)


def is_grid(composed: DictConfig) -> bool:
    """Whether the jobs of a sweep are all combinations of listed values, as by Hydra's own sweeper."""
    return str(composed.hydra.sweeper._target_).endswith(".BasicSweeper")


def folder_of(composed: DictConfig, key: str) -> Path:
    """Where a run is to lie (``hydra.run.dir``) or the jobs of a sweep (``hydra.sweep.dir``)."""
    with _as_hydra_config(composed):
        return Path(str(OmegaConf.select(composed, key))).absolute()


@contextlib.contextmanager
def _as_hydra_config(composed: DictConfig) -> Iterator[None]:
    """Inside the block ``${hydra:…}`` is of this composition."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
        OmegaConf.set_readonly(composed.hydra, False)  # as it was composed


def require_folder(command: str, key: str, folder: str) -> None:
    """Refuse a job's folder outside outputs/; the commands that make none are given the working folder itself."""
    if command == "train" or Path(folder).absolute() != Path.cwd():
        require_below_outputs(key, folder)


def require_below_outputs(key: str, folder: str, given: str | None = None) -> None:
    """Refuse a folder that does not lie below outputs/, links and ``..`` followed; ``given``: what to show for it."""
    try:
        below = is_below_outputs(Path(folder))
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a NUL
        raise RequestError(f"{key}={given or folder!r}: is no folder ({error})") from error
    outside = f"lies outside {outputs_dir()}, where everything is written; choose a folder below it"
    require(below, f"{key}={given or folder}: {outside}, or move all of it with MLMX_OUTPUTS=<folder>")


def quoted(text: str) -> str:
    """A text as Hydra takes it literally, in single quotes: quotes, ``${`` and backslashes before either escaped."""
    ended = re.sub(r"(\\+)\Z", r"\1\1", text)
    return "'" + re.sub(r"(\\*)('|\$\{)", r"\1\1\\\2", ended) + "'"


def overrides_of(node: DictConfig, of: str = "task") -> list[str]:
    """The overrides of a composition as they were given, from its ``hydra`` node; ``${…}`` in them stays."""
    listed: Any = OmegaConf.to_container(node.overrides[of], resolve=False)
    return list(map(str, listed))


def key_of(override: str) -> str:
    """``+model@there=ours`` → ``model``."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _moment() -> str:
    """Local time to the millisecond, so that runs started together get folders of their own."""
    return datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S.%f")[:-3]


def register_resolvers() -> None:
    """``${outputs:}`` and ``${moment:}`` for the folders in ``conf/*.yaml``."""
    OmegaConf.register_new_resolver("outputs", lambda: str(outputs_dir()), replace=True)
    OmegaConf.register_new_resolver("moment", _moment, replace=True, use_cache=True)
