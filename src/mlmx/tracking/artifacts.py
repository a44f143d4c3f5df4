"""Files at an address of MLflow's: those of a run, and those of a model."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

LINKED = (".safetensors", "tokenizer.json")  # written once, under a new name; other files may be rewritten
GROWING = (".jsonl", ".log")  # while the run goes on


class Artifacts:
    """Linked or copied where the address is a folder of this machine's disks, else sent to the server; there sizes are
    compared, as it keeps no checksums."""

    def __init__(self, address: str, tracking_uri: str) -> None:
        parsed = urlparse(address)
        self.local = Path(url2pathname(parsed.path)) if parsed.scheme in ("", "file") else None
        self.remote: Any = None
        if self.local is None:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            self.remote = get_artifact_repository(address, tracking_uri=tracking_uri)

    def bring(self, paths: Sequence[Path], folder: str = "", again: bool = False) -> int:
        """Put those of these files that ``folder`` does not have as they are; returns how many. With ``again`` the
        others as well: a server tells sizes, which a file may keep when it is written again."""
        if self.local is not None:  # looked at; asking MLflow takes 20 ms
            lacking = [path for path in paths if not is_placed(path, self.local / folder / path.name)]
        else:
            listed = self.remote.list_artifacts(folder or None) if paths else []
            sizes = {PurePosixPath(one.path).name: one.file_size for one in listed}
            lacking = [path for path in paths if sizes.get(path.name) != path.stat().st_size]
        for path in paths if again else lacking:
            self._put(path, folder)
        return len(lacking)

    def write(self, texts: Mapping[str, str], again: bool) -> int:
        """Put those of these files, by their texts, that are not there (``again``: all of them); returns how many."""
        there: set[str] = set()
        if not again and self.local is not None:
            there = {path.name for path in self.local.glob("*")}
        elif not again:
            there = {one.path for one in self.remote.list_artifacts()}
        lacking = [name for name in texts if name not in there]
        with tempfile.TemporaryDirectory(prefix="mlmx-") as aside:
            for name in lacking:
                (Path(aside) / name).write_text(texts[name], encoding="utf-8")
                self._put(Path(aside) / name)
        return len(lacking)

    def remove(self) -> None:
        """All of them."""
        if self.local is None:
            self.remote.delete_artifacts()
        else:
            shutil.rmtree(self.local, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.local.parent.rmdir()

    def _put(self, path: Path, folder: str = "") -> None:
        if self.local is not None:
            place(path, self.local / folder / path.name)
        elif path.suffix in GROWING:  # of a copy: what comes after its length was said would be taken for a request
            with tempfile.TemporaryDirectory(prefix="mlmx-") as aside:
                self.remote.log_artifact(shutil.copy2(path, aside), folder or None)
        else:
            self.remote.log_artifact(str(path), folder or None)


def place(path: Path, target: Path) -> None:
    """A file at its place in a local store."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if path.name.endswith(LINKED):
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copy2(path, target)


def is_placed(path: Path, target: Path) -> bool:
    """Whether a file is there as it is; weights, which are never rewritten, are not read for that."""
    if not target.is_file() or target.stat().st_size != path.stat().st_size:
        return False
    return path.name.endswith(".safetensors") or filecmp.cmp(path, target, shallow=False)
