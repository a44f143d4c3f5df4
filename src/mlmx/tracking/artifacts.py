"""Files as artifacts of an MLflow store: hard links where it is on the same disk, so weights take their space once."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

LINKED = (".safetensors", "tokenizer.json")  # written once, under a new name; other files may be rewritten
NOT_READ = ".safetensors"
GROWING = (".jsonl", ".log")  # while the run goes on


def local_folder(address: str) -> Path | None:
    """Where artifacts lie on this machine's disks; None for those of a server."""
    parsed = urlparse(address)
    return Path(url2pathname(parsed.path)) if parsed.scheme in ("", "file") else None


def place(path: Path, target: Path) -> None:
    """A file at its place in a local store."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        if not path.name.endswith(LINKED):
            raise OSError("copied")
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def is_placed(path: Path, target: Path) -> bool:
    """Whether a file is there as it is; weights, which are never rewritten, are not read for that."""
    if not target.is_file() or target.stat().st_size != path.stat().st_size:
        return False
    return path.name.endswith(NOT_READ) or filecmp.cmp(path, target, shallow=False)


@contextlib.contextmanager
def at_rest(path: Path) -> Iterator[Path]:
    """A copy of a file that grows: what comes after its length was told would be taken for another request."""
    if path.suffix not in GROWING:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mlmx-") as folder:
        yield Path(shutil.copy2(path, folder))
