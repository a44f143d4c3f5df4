"""Arrays kept by name: in memory between the jobs of a process, in a folder between processes.

An entry is a folder of arrays, memory-mapped when read; whoever asks for one names it after what it is made of. What
reads it checks the sizes and checksums that are written beside the arrays, and makes a damaged one anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mlmx.config import whole

log = logging.getLogger("mlmx")
IN_MEMORY = 4  # entries: training and held-out tokens of the last two corpora


@dataclass(frozen=True, eq=False)
class Entry:
    """What is kept under one name: arrays, and facts that go into JSON."""

    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any]


class TokenCache:
    """Gives entries, and makes them only where nobody has yet.

    Used as a context. Nothing is written before `keep`, so that a run which is refused leaves nothing behind; from
    making to keeping, or to the end of the block, other processes that want the same entry wait for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._memory: dict[str, Entry] = {}
        self._used: set[str] = set()
        self._damaged: set[str] = set()
        self._locks: list[FileLock] = []

    def __enter__(self) -> TokenCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._used.clear()
        self._release()

    def get(self, name: str, make: Callable[[], Entry]) -> Entry:
        entry = self._memory.pop(name, None) or self._read(name)
        if entry is None:
            # Wait for any process that is making it. The lock lies outside the folder, which may not exist yet.
            digest = hashlib.sha256(f"{self.folder.absolute()}/{name}".encode()).hexdigest()[:16]
            lock = FileLock(Path(tempfile.gettempdir()) / f"mlmx-{os.getuid()}-{digest}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                log.info("another run is tokenising the same texts; waiting for it")
                lock.acquire()
            self._locks.append(lock)
            entry = self._read(name) or make()  # another process may have kept it while this one waited
        self._used.add(name)
        self._memory[name] = entry  # the newest last
        while len(self._memory) > IN_MEMORY:
            oldest = next(iter(self._memory))
            del self._memory[oldest]
            self._used.discard(oldest)
        return entry

    def keep(self) -> None:
        """Write what was used and is not in the folder yet."""
        for name in sorted(self._used):
            entry, target = self._memory[name], self.folder / name
            if name in self._damaged or not target.is_dir():
                # Another process sees all of it or nothing; what a power cut makes of it, its checksums tell.
                try:
                    with whole.folder(target, to_disk=False) as made:
                        files = {one: made / f"{one}.npy" for one in entry.arrays}
                        for one, file in files.items():
                            np.save(file, entry.arrays[one], allow_pickle=False)
                        said = json.dumps([entry.facts, {one: _checksum(file) for one, file in files.items()}])
                        contents = {"said": said, "crc32": zlib.crc32(said.encode())}
                        (made / "entry.json").write_text(json.dumps(contents), encoding="utf-8")
                except OSError as error:
                    if not target.is_dir():  # another process may have been faster, with the same tokens
                        log.info("%s: the tokens cannot be kept for later runs (%s)", self.folder, error)
            self._damaged.discard(name)
        self._release()

    def _read(self, name: str) -> Entry | None:
        """Memory-mapped arrays; None, and known to be damaged, where anything is not as it was written."""
        folder, arrays = self.folder / name, {}
        if name in self._damaged or not folder.is_dir():
            return None
        try:
            contents = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
            if zlib.crc32(contents["said"].encode()) != contents["crc32"]:
                raise ValueError("entry.json has changed")
            facts, checksums = json.loads(contents["said"])
            for one, checksum in checksums.items():
                file = folder / f"{one}.npy"
                if _checksum(file) != checksum:
                    raise ValueError(f"{one}.npy has changed")
                # Plain views of the mapped files: rows of a np.memmap are made several times more slowly.
                arrays[one] = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
            return Entry(arrays, facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.info("%s: damaged, its tokens are made anew (%s)", folder, error)
            self._damaged.add(name)
            return None

    def _release(self) -> None:
        while self._locks:
            lock = self._locks.pop()
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


@lru_cache(maxsize=1)
def token_cache(folder: Path) -> TokenCache:
    """The cache of this process for a folder; the jobs of a sweep share it."""
    return TokenCache(folder)


def _checksum(path: Path) -> list[int]:
    """Bytes of the file and their crc32."""
    contents = np.memmap(path, np.uint8, mode="r")
    return [len(contents), zlib.crc32(contents.data)]
