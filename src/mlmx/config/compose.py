"""Hydra's composition within bounds: what it breaks on is refused by name, and config files are read only if plain.

Hydra says well what it refuses, but on some values it breaks (a list of lists as an option, an integer of 5,000
digits), and YAML can be small and mean gigabytes (an anchor repeated in a list that is repeated in a list …).
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from mlmx.config.errors import RequestError, require
from mlmx.config.paths import conf_dir, is_below_outputs, outputs_dir
from mlmx.config.redaction import refuse_secrets

MOST_BYTES = 100_000  # of a config file
MOST_NODES = 10_000  # of it, every repetition of an anchor counted
MOST_LEVELS = 30  # of nesting


def composed(
    command: str, overrides: Sequence[str], search_path: Sequence[str] = (), multirun: bool = False
) -> DictConfig:
    """What Hydra composes of a command's config and these overrides, its own node included.

    Args:
        search_path: overrides as well, which are at no fault.
        multirun: compose what holds for a whole sweep; overrides may then have several values.
    Raises:
        RequestError: where Hydra breaks, naming the override on which it does.
        HydraException, OmegaConfBaseException: what Hydra refuses.
    """
    with _plain_files():
        try:
            return _compose(command, [*overrides, *search_path], multirun)
        except (RequestError, HydraException, OmegaConfBaseException):
            raise
        except Exception as error:
            culprit = next(
                (one for one in overrides if _breaks(command, [one, *search_path], multirun)), " ".join(overrides)
            )
            raise RequestError(f"{culprit}: cannot be composed ({type(error).__name__}: {error})") from error


def _compose(command: str, overrides: list[str], multirun: bool) -> DictConfig:
    loader = GlobalHydra.instance().config_loader()
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    return loader.load_configuration(command, overrides, mode, from_shell=False)


def _breaks(command: str, overrides: list[str], multirun: bool) -> bool:
    try:
        _compose(command, overrides, multirun)
    except (RequestError, HydraException, OmegaConfBaseException):
        return False
    except Exception:
        return True
    return False


@contextlib.contextmanager
def composed_once() -> Iterator[None]:
    """Inside the block a job of a sweep gets the config that Hydra's sweeper has composed to check it.

    Its launcher would compose it again: a tenth of a second for every job, and of YAML that may have changed since.
    """
    own, checked = ConfigLoaderImpl.load_sweep_config, dict[tuple[str, ...], Any]()

    def load(loader: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> Any:
        key = tuple(sweep_overrides)
        if key not in checked:
            checked[key] = own(loader, master_config, sweep_overrides)
        return copy.deepcopy(checked[key])  # each job's own: Hydra writes its number into it

    ConfigLoaderImpl.load_sweep_config = load  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_sweep_config = own  # type: ignore[method-assign]


@contextlib.contextmanager
def _plain_files() -> Iterator[None]:
    """Inside the block Hydra reads no config file of the user's that `require_plain` refuses."""
    read = FileConfigSource.load_config

    def checked(source: FileConfigSource, config_path: str) -> Any:
        file = Path(source.path, source._normalize_file_name(config_path))
        if file.is_file() and not file.resolve().is_relative_to(conf_dir()):
            require_plain(file)
        return read(source, config_path)

    FileConfigSource.load_config = checked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileConfigSource.load_config = read  # type: ignore[method-assign]


def require_plain(file: Path) -> None:
    """Refuse a config file that is no YAML mapping of plain values, or one too large, too deep or endless.

    Raises:
        RequestError: with the file, what is wrong and, where known, the line.
    """
    size = file.stat().st_size
    require(size <= MOST_BYTES, f"{file}: has {size:,} bytes; a config file has at most {MOST_BYTES:,}")
    too_deep = f"{file}: is nested more than {MOST_LEVELS} levels deep; write it flatter"
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=get_yaml_loader())
        nodes = _size(root, {}, 0)[0]
        get_yaml_loader()(text).get_single_data() if nodes <= MOST_NODES else None
    except RecursionError:
        raise RequestError(too_deep) from None
    except Exception as error:  # of many kinds: a byte that is no UTF-8, a tag of Python's, !!int of an empty text
        raise RequestError(f"{file}: cannot be read as YAML ({type(error).__name__}: {error})") from error
    require(
        root is None or isinstance(root, yaml.MappingNode),
        f"{file}: holds no key: value pairs; an option is a mapping such as 'name: scratch'",
    )
    require(
        nodes <= MOST_NODES, f"{file}: holds more than {MOST_NODES:,} values, repeated anchors counted; write fewer"
    )


def _size(node: yaml.Node | None, known: dict[int, tuple[int, int]], level: int) -> tuple[int, int]:
    """Values and levels of a node, those of repeated anchors each time.

    Raises:
        RecursionError: beyond `MOST_LEVELS`, so also where an anchor holds itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1, 1
    if id(node) not in known:
        if level >= MOST_LEVELS:
            raise RecursionError
        inside = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes = [_size(one, known, level + 1) for one in inside]
        known[id(node)] = 1 + sum(size[0] for size in sizes), 1 + max((size[1] for size in sizes), default=0)
    if level + known[id(node)][1] > MOST_LEVELS:
        raise RecursionError
    return known[id(node)]


# ------------------------------------------------------------------------- what Hydra's own node may say

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


def is_grid(composed: DictConfig) -> bool:
    """Whether the jobs of a sweep are all combinations of listed values, as by Hydra's own sweeper."""
    return str(composed.hydra.sweeper._target_).endswith(".BasicSweeper")


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


def quoted(text: str) -> str:
    """A text as Hydra takes it literally, in single quotes."""
    return "'" + _escaped(text) + "'"


def _escaped(text: str) -> str:
    """Inside Hydra's single quotes: quotes, ``${`` and the backslashes before either are escaped."""
    return re.sub(r"(\\*)('|\$\{)", r"\1\1\\\2", re.sub(r"(\\+)\Z", r"\1\1", text))


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
