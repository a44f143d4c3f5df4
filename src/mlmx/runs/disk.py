"""Disk space: how much a run will write, what a full disk could not take, and a little kept back to say so."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlmx.config.errors import WorkError, require

OTHER_BYTES = 16 * 2**20  # logs, numbers, plots, rows of the MLflow store
RESERVE_FILE, RESERVE_BYTES = ".reserve", 2**20
# Libraries that pass an error on as text: safetensors, sqlite.
FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")


class DiskFullError(WorkError):
    """The one line a full disk ends a command with."""


def needed_bytes(weights: int, optimizer: int, kept: int) -> int:
    """The most bytes that a run takes at any time; ``kept``: checkpoints that are there when one has been saved.

    MLflow's links to them take no space. One more is being written, or saved by a signal. The final model comes when
    none is; until then its bytes are those of weights that MLflow lets go of late.
    """
    return (kept + 1) * (weights + optimizer) + weights + OTHER_BYTES


def require_free(folder: Path, needed: int, kept: int) -> None:
    """Refuse a run that the disk has no room for."""
    free = free_bytes(folder)
    fewer = "keep fewer checkpoints (keep=1), " if kept > 1 else ""
    found = f"{folder}: the run will take up to {in_words(needed)}, and {in_words(free)} are free there"
    require(needed <= free, f"{found}; make space, {fewer}or write to another disk (MLMX_OUTPUTS=<folder>)")


def free_bytes(folder: Path) -> int:
    """What may still be written on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def bytes_below(folder: Path) -> int:
    """Size of all files in a folder, which need not be there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_words(size: int) -> str:
    """Bytes as people read them: ``999 B``, ``12.3 kB``, ``3.21 GB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a full disk or a spent quota."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        said = isinstance(error, DiskFullError) or any(words in str(error) for words in FULL_IN_WORDS)
        if said or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk inside the block is an ENOSPC with the path it had no room for, whatever a library made of it."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def disk_full(error: BaseException, run: Path | None = None) -> DiskFullError:
    """The error of a full disk as one line: what was not written, what is free, how to go on with the run."""
    if isinstance(error, DiskFullError):
        return error
    what = "a file could not be written"
    if isinstance(named := getattr(error, "filename", None), str):
        what = f"{Path(named)} could not be written ({in_words(free_bytes(Path(named).absolute()))} free there)"
    then = f"go on: python -m mlmx train resume={shlex.quote(str(run))}" if run else "run the command again"
    return DiskFullError(f"disk full: {what}; make space and {then}")


def reserve(folder: Path) -> None:
    """Keep some space back in a run's folder, for the lines that say that there is none; `release` gives it free."""
    with contextlib.suppress(OSError), (folder / RESERVE_FILE).open("wb") as file:
        file.write(os.urandom(RESERVE_BYTES))  # zeros would take no space on some disks


def release(folder: Path) -> None:
    """Free what `reserve` kept."""
    with contextlib.suppress(OSError):
        (folder / RESERVE_FILE).unlink(missing_ok=True)
