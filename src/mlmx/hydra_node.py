"""What Hydra's own node may say. It can make folders anywhere, name code and set the environment: little of it is open.

Checked for every job as Hydra will compose it, before it makes its first folder.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from mlmx.config import RequestError, refuse_secrets, require
from mlmx.places import is_below_outputs, outputs_dir

CORE = "hydra._internal.core_plugins"
# Where Hydra's node names code, and what may stand there: its own launcher and sweeper, and installed plugins.
TARGETS = {
    "launcher._target_": rf"{CORE}\.basic_launcher\.BasicLauncher|hydra_plugins\.\w+\.\w+\.\w*Launcher",
    "sweeper._target_": rf"{CORE}\.basic_sweeper\.BasicSweeper|hydra_plugins\.\w+\.\w+\.\w*Sweeper",
    "sweeper.sampler._target_": r"optuna\.samplers\.\w+Sampler",
}
FOLDERS = ("run.dir", "sweep.dir", "sweep.subdir")
# Lists and mappings that are empty in Hydra's defaults, and why they stay so.
EMPTY = {
    "callbacks": "a config names no code",
    "job.env_copy": "the environment may hold secrets, and Hydra writes what it copies to multirun.yaml",
    "job.env_set": "a config sets no environment variable; export it before the command",
}


def swept_params(command: str, composed: DictConfig) -> dict[str, Any]:
    """``hydra.sweeper.params`` of a sweep, whose own composition, kept in multirun.yaml, is checked here.

    Args:
        composed: of the command line's overrides, swept ones as well.
    """
    require_confined(command, composed, multirun=True)
    refuse_secrets(OmegaConf.to_container(composed, resolve=False))
    return dict(composed.hydra.sweeper.get("params") or {})


def require_confined(command: str, composed: DictConfig, number: int = 0, multirun: bool = False) -> None:
    """Refuse a composition whose ``hydra`` node could write outside outputs/, run code or change the process.

    Args:
        composed: with its ``hydra`` node.
        number: the job's place in the sweep.
    Raises:
        RequestError: where; what is allowed; what to do.
    """
    node = composed.hydra
    require(
        multirun or getattr(node.mode, "name", None) != "MULTIRUN",
        "hydra.mode=MULTIRUN: is not taken from a config; a sweep is asked for by -m",
    )
    for key, reason in EMPTY.items():
        require(not OmegaConf.select(node, key), f"hydra.{key}: is not taken; {reason}")
    require(node.output_subdir is None, "hydra.output_subdir: is not taken; a run writes its own config.yaml")
    require(not node.job.chdir, "hydra.job.chdir: is not taken; a run stays in the folder it was started in")
    for name in ("job_logging", "hydra_logging"):
        chosen = OmegaConf.select(node, name)
        require(
            chosen is not None and chosen.get("root") is None,
            f"hydra/{name}: is not taken; a run writes its own train.log (leave it at none)",
        )
    for path, target in _targets(OmegaConf.to_container(node, resolve=False), ""):
        allowed = TARGETS.get(path)
        require(
            allowed is not None and re.fullmatch(allowed, str(target)) is not None,
            f"hydra.{path}={target}: is not taken; Hydra's own launcher and sweeper, and its installed plugins, are",
        )
    _require_folders(command, composed, number)


def _targets(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        where = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield where, inner
        yield from _targets(inner, where)


def sweep_folder(composed: DictConfig) -> Path:
    """Where Hydra would put the jobs of a sweep."""
    with _as_hydra_config(composed):
        return Path(str(OmegaConf.select(composed, "hydra.sweep.dir"))).absolute()


@contextlib.contextmanager
def _as_hydra_config(composed: DictConfig) -> Iterator[None]:
    """Inside the block ``${hydra:…}`` is of this composition."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _require_folders(command: str, composed: DictConfig, number: int) -> None:
    """The folders that Hydra would make for this job lie below outputs/."""
    with open_dict(composed):
        composed.hydra.job.num = number
        composed.hydra.job.id = str(number)
    with _as_hydra_config(composed):  # for ${hydra:…} in a folder's name
        run, sweep, subdir = (str(OmegaConf.select(composed, f"hydra.{key}")) for key in FOLDERS)
    require_folder(command, "hydra.run.dir", run)
    require_below_outputs("hydra.sweep.dir", sweep)
    require_below_outputs("hydra.sweep.subdir", str(Path(sweep) / subdir), subdir)


def require_folder(command: str, key: str, folder: str) -> None:
    """Refuse a job's folder outside outputs/; the commands that make none are given the working folder itself."""
    if command == "train" or Path(folder).absolute() != Path.cwd():
        require_below_outputs(key, folder)


def require_below_outputs(key: str, folder: str, given: str | None = None) -> None:
    """Refuse a folder that does not lie below outputs/, links and ``..`` followed.

    Args:
        given: what to show as given, if not ``folder``.
    """
    try:
        below = is_below_outputs(Path(folder))
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a NUL
        raise RequestError(f"{key}={given or folder!r}: is no folder ({error})") from error
    require(
        below,
        f"{key}={given or folder}: lies outside {outputs_dir()}, where everything is written; choose a folder below "
        "it, or move all of it with MLMX_OUTPUTS=<folder>",
    )
