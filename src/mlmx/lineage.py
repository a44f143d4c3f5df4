"""What a run was made with, in files of its folder: all packages, and what the code has that no commit has.

::

    packages.txt   name==version of everything installed, a line each
    git.diff       what differs from the commit in mlflow.source.git.commit; only where something does

A run that was resumed with others has them beside these: packages.resumed.txt, git.resumed.diff.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import subprocess
import threading
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from mlmx import provenance
from mlmx.redaction import redact
from mlmx.runs import Run

log = logging.getLogger("mlmx")
PACKAGES_FILE, DIFF_FILE = "packages.txt", "git.diff"
MOST_DIFF_BYTES = 2**20
PATIENCE_SECONDS = 5.0  # at the end of a run that was shorter than this takes


@contextlib.contextmanager
def kept(run: Run) -> Iterator[None]:
    """The files are written during the block, by a thread: the training does not wait for git or a slow disk."""
    thread = threading.Thread(target=_write, args=(run,), name="lineage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_SECONDS)


def _write(run: Run) -> None:
    try:
        for name, text in ((PACKAGES_FILE, packages()), (DIFF_FILE, redact(changes()))):
            path = run.folder / name
            other = path.is_file() and path.read_text(encoding="utf-8") != text  # than it was begun with
            if text:
                run.write_text(resumed_name(name) if other else name, text)
    except Exception as error:  # the run does not need them
        log.warning("%s: what it was made with could not be kept (%s)", run.folder, error)


def resumed_name(name: str) -> str:
    """``git.diff`` → ``git.resumed.diff``."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}.resumed.{kind}"


@cache
def packages() -> str:
    """As ``pip freeze`` lists them, headed by Python and the system."""
    versions: dict[str, str] = {}
    for found in distributions():  # of two of a name the first is imported
        versions.setdefault(str(found.name), found.version)
    listed = "".join(f"{name}=={versions[name]}\n" for name in sorted(versions, key=str.lower))
    return f"# Python {platform.python_version()}, {platform.platform()}\n{listed}"


@cache
def changes() -> str:
    """The code's own changes since its commit, and the names of files that git does not know; at most 1 MiB."""
    checkout = provenance.checkout()
    if checkout is None or provenance.code().get("mlmx.git_dirty") != "true":
        return ""
    unknown = provenance.git(checkout, "ls-files", "--others", "--exclude-standard") or ""
    head = "".join(f"# not known to git: {name}\n" for name in unknown.splitlines())
    return _bounded(head.encode() + _diff(checkout))


def _diff(checkout: Path) -> bytes:
    # Neither colours nor programs that a user's settings may name; read no further than is kept.
    command = ["git", "-C", str(checkout), "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        found = process.stdout.read(MOST_DIFF_BYTES + 1)
        process.kill()
    return found


def _bounded(found: bytes) -> str:
    if len(found) <= MOST_DIFF_BYTES:
        return found.decode(errors="replace")
    whole = found[: found.rindex(b"\n", 0, MOST_DIFF_BYTES) + 1] if b"\n" in found[:MOST_DIFF_BYTES] else b""
    return whole.decode(errors="replace") + f"# cut here: more than {MOST_DIFF_BYTES:,} bytes\n"
