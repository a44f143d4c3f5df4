"""Hydra's composition within bounds: what it breaks on is refused by name, and config files are read only if plain.

Hydra says well what it refuses, but on some values it breaks (a list of lists as an option, an integer of 5,000
digits), and YAML can be small and mean gigabytes (an anchor repeated in a list that is repeated in a list …).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from mlmx.config import RequestError, require
from mlmx.places import conf_dir

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
