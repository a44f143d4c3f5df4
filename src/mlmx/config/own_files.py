"""YAML of the user's own, below ``--config-dir``: Hydra reads it only if it is plain.

YAML can be small and mean gigabytes (an anchor repeated in a list that is repeated in a list …).
"""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf._utils import get_yaml_loader

from mlmx.config.errors import RequestError, require

MOST_BYTES = 100_000  # of a config file
MOST_NODES = 10_000  # of it, every repetition of an anchor counted
MOST_LEVELS = 30  # of nesting
SCHEME = "plain"


class PlainFiles(FileConfigSource):
    """A folder of ``hydra.searchpath`` (``plain:///home/ann/own``) of whose files Hydra reads those that are plain."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """As Hydra's own source of files.

        Raises:
            RequestError: see `require_plain`.
        """
        file = Path(self.path, self._normalize_file_name(config_path))
        if file.is_file():
            require_plain(file)
        return super().load_config(config_path)


def register_source() -> None:
    """Make `PlainFiles` known to Hydra."""
    Plugins.instance().register(PlainFiles)


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
