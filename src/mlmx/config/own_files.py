"""YAML of the user's own, below ``--config-dir``: read only if it is plain, and noted, so that a run can keep it.

YAML can be small and mean gigabytes (an anchor repeated in a list that is repeated in a list …).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from mlmx.config.compose import quoted
from mlmx.config.errors import RequestError, did_you_mean, path_of, require
from mlmx.config.paths import conf_dir
from mlmx.config.redaction import exposed, remedy

MOST_BYTES = 100_000  # of a config file
MOST_NODES = 10_000  # of it, every repetition of an anchor counted
MOST_LEVELS = 30  # of nesting
SCHEME = "plain"
SEARCH = "hydra.searchpath"
FOLDER = "conf"  # of a run or a sweep: the YAML of the user's own that it was made with
Files = Mapping[str, str]  # ``{"model/mine.yaml": its text}``

_noted: ContextVar[dict[str, str] | None] = ContextVar("own_files", default=None)


class PlainFiles(FileConfigSource):
    """A folder of ``hydra.searchpath`` (``plain:///home/ann/own``) of whose files Hydra reads those that are plain."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        place = self._normalize_file_name(config_path)
        if Path(self.path, place).is_file():
            _read(Path(self.path), place)
        return super().load_config(config_path)


def searched(folders: Sequence[str]) -> str:
    """The override by which Hydra finds what lies in these folders: ``hydra.searchpath=['plain:///home/ann/own']``."""
    sources = []
    for folder in folders:
        scheme, there, path = folder.rpartition("://")
        is_file = not there or scheme == "file"
        sources.append(quoted(f"{SCHEME}://{path_of(SEARCH, path).resolve()}" if is_file else folder))
    return f"{SEARCH}=[{','.join(sources)}]"


def folders_of(node: DictConfig) -> list[Path]:
    """The folders of the user's own that were searched for a composition, from its ``hydra`` node."""
    return [Path(source.path) for source in node.runtime.config_sources if source.schema == SCHEME]


@contextlib.contextmanager
def noted() -> Iterator[Files]:
    """Inside the block, the files of the user's that are read."""
    files: dict[str, str] = {}
    before = _noted.set(files)
    try:
        yield files
    finally:
        _noted.reset(before)


def require_no_secret(files: Files) -> None:
    """Refuse files that hold what would let somebody in: copies of them are kept."""
    for place, text in files.items():
        if (what := exposed(text)) is not None:
            raise RequestError(f"{place}: holds {what}, and is copied into the folder of the run; {remedy(what)}")


def kept(folder: Path) -> dict[str, str]:
    """The files that were kept with a run or a sweep."""
    home = folder / FOLDER
    return {str(file.relative_to(home)): file.read_text(encoding="utf-8") for file in sorted(home.rglob("*.yaml"))}


def shipped(name: str) -> dict[str, Any]:
    """The keys and values of ``conf/<name>.yaml``."""
    text = (conf_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml_loader()(text).get_single_data())


@cache
def yaml_loader() -> Callable[[str], yaml.SafeLoader]:
    """Reads plain values only, and takes for numbers what OmegaConf does; in C, ten times as fast, if possible."""

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers

    return Loader


def fill_in(node: object, key: str, folders: Sequence[Path]) -> None:
    """In place of the name of a dataset of the user's own its values: its folder may be gone when they are wanted."""
    if not (isinstance(node, dict) and folders):
        return
    name = node.get(key)
    folder = _folder_of("dataset", name, folders) if isinstance(name, str) and name else conf_dir()
    if folder != conf_dir():
        values = OmegaConf.to_container(OmegaConf.create(_read(folder, f"dataset/{name}.yaml")), resolve=True)
        node[key] = {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def load_option(group: str, option: str) -> dict[str, Any]:
    """A shipped option of a group (``conf/dataset/imdb.yaml``) as plain values, for use in another place."""
    _folder_of(group, option)
    return shipped(f"{group}/{option}")


def _folder_of(group: str, option: str, folders: Sequence[Path] = ()) -> Path:
    """Where an option stands; a shipped one is never replaced."""
    known = {path.stem: home for home in (*reversed(folders), conf_dir()) for path in (home / group).glob("*.yaml")}
    listed = sorted(known)
    near = did_you_mean(option, listed)
    require(option in known, f"{group}={option}: no such option{near} (options: {', '.join(listed)})")
    return known[option]


def _read(folder: Path, place: str) -> str:
    """A config file's text, noted; refused if no YAML mapping of plain values, or too large, too deep or endless."""
    own, file = os.path.normpath(place), folder / place
    # A copy of it would lie elsewhere as well.
    require(not own.startswith(("..", "/")), f"{place}: lies outside {folder}; name an option below it")
    size = file.stat().st_size
    require(size <= MOST_BYTES, f"{file}: has {size:,} bytes; a config file has at most {MOST_BYTES:,}")
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=get_yaml_loader())
        nodes = _size(root, {}, 0)[0]
        if nodes <= MOST_NODES:
            get_yaml_loader()(text).get_single_data()
    except RecursionError:
        raise RequestError(f"{file}: is nested more than {MOST_LEVELS} levels deep; write it flatter") from None
    except Exception as error:  # of many kinds: a byte that is no UTF-8, a tag of Python's, !!int of an empty text
        raise RequestError(f"{file}: cannot be read as YAML ({type(error).__name__}: {error})") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise RequestError(f"{file}: holds no key: value pairs; an option is a mapping such as 'name: scratch'")
    if nodes > MOST_NODES:
        raise RequestError(f"{file}: holds more than {MOST_NODES:,} values, repeated anchors counted; write fewer")
    if (files := _noted.get()) is not None:
        files.setdefault(own, text)
    return text


def _size(node: yaml.Node | None, known: dict[int, tuple[int, int]], level: int) -> tuple[int, int]:
    """Values and levels of a node, those of repeated anchors each time; an anchor that holds itself has too many."""
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
