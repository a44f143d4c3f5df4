"""Files and folders that are there as a whole or not at all: written aside, brought to the disk, then renamed.

What a process that is killed meanwhile leaves behind is called ``.<name>.….tmp``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, contents: str | bytes) -> None:
    """A file; a reader finds what was there before or all of this, also where writing fails (a full disk, say)."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            # Half of a surrogate pair has no place in UTF-8: escaped as JSON does.
            file.write(contents if isinstance(contents, bytes) else contents.encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave an empty file of that name
        aside.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the one aside, or none
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(path: Path, to_disk: bool = True) -> Iterator[Path]:
    """An empty folder to be filled inside the block; then, once ``to_disk``, it takes the place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    made, old = work / "new", work / "old"
    try:
        made.mkdir()
        yield made
        for part in (*made.rglob("*"), made) if to_disk else ():
            _to_disk(part)
        if path.exists():
            path.rename(old)
        made.rename(path)
        if to_disk:
            _to_disk(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(work, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
