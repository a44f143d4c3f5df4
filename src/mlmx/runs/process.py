"""Which runs are alive: a run's process holds a lock on its folder, says who it is, and says so again and again.

::

    outputs/train/<time>/.lock          held as long as the process lives, whatever ends it
    outputs/train/<time>/process.json   a `ProcessRecord`; its time is the heartbeat, every 30 seconds

On one machine the lock is the truth. Other machines that share the disk may not see it; there the heartbeat decides.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from mlmx.config.errors import RequestError
from mlmx.runs import provenance, records
from mlmx.runs.records import ProcessRecord, Result, Status
from mlmx.runs.run import Run, all_runs, discard_empty

log = logging.getLogger("mlmx")
LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 30.0
SILENCE_SECONDS = 300.0  # without a heartbeat a process elsewhere counts as dead
SAME_SECONDS = 1.0  # a process is the one that began at that moment; the system tells it anew each time
LOOK_SECONDS = 0.5  # another process that only looks whether the lock is held takes it for less than this


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run's folder as this process's own, from before its first file to its end; refused while another one holds it.

    Where the run does not begin, or a request to go on with it is refused, nothing tells that it was held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, lock, ended = folder / ProcessRecord.FILE, FileLock(folder / LOCK_FILE), threading.Event()
    old_lock, old_run = Path(lock.lock_file).exists(), (folder / Result.FILE).exists()

    def beat() -> None:  # the file's time is now, again and again
        while not ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is away for a while is no end
                os.utime(path)

    try:
        lock.acquire(timeout=LOOK_SECONDS, poll_interval=0.02)
    except Timeout:
        raise RequestError(f"{folder}: {holder(Run(folder))}") from None
    before = path.read_bytes() if path.is_file() else None
    try:
        records.write(replace(provenance.process(), started=records.moment()), folder)
        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
        yield
    except BaseException as error:
        if (old_run and isinstance(error, RequestError)) or not (folder / Result.FILE).exists():
            with contextlib.suppress(OSError):  # what is under way says more
                if before is None:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(before)
            if not old_lock:
                Path(lock.lock_file).unlink(missing_ok=True)
            discard_empty(folder)
        raise
    finally:
        ended.set()
        lock.release()


def holder(run: Run) -> str:
    """Who is at a run, and what to do about it, in words."""
    who = process_of(run)
    if who.pid is None:
        return "is in use by another process; wait for it, or choose another hydra.run.dir"
    since = f"since {who.started}" if who.started else ""
    return f"is in use by process {who.pid} on {who.host} {since}; wait for it, end it, or choose another hydra.run.dir"


def process_of(run: Run) -> ProcessRecord:
    """What the run's process said of itself."""
    return records.read(ProcessRecord, run.folder) or ProcessRecord()


def heard_seconds_ago(run: Run) -> float:
    """Seconds since the last heartbeat; for a run without one, as of MLflow, since its files were last written."""
    path = run.folder / ProcessRecord.FILE
    paths = [path] if path.is_file() else [run.folder / name for name in (Result.FILE, "metrics.jsonl", "train.log")]
    return time.time() - max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def is_alive(run: Run, running: bool | None = None) -> bool:
    """Whether the process that makes a run is still there; ``running``: whether its files say so, else `Run.status`."""
    who, here = process_of(run), provenance.process()
    if _of_one_machine(who, here):  # its children may hold the lock for a while longer than it
        with unless_held(run.folder) as is_free:
            return not is_free and not is_gone(who, here)
    restarted = provenance.boot_time()
    if who.host == here.host and restarted and time.time() - heard_seconds_ago(run) < restarted:
        return False  # not heard since this machine started anew; a later heartbeat is one of its namesake
    says_so = run.status == Status.RUNNING if running is None else running
    return says_so and heard_seconds_ago(run) < SILENCE_SECONDS


def is_gone(who: ProcessRecord, here: ProcessRecord) -> bool:
    """Whether a process is known to have ended: of this machine and namespace, and its pid is free or another's."""
    if who.pid is None or who.pid_started is None:  # the lock has to tell
        return False
    if not _of_one_machine(who, here) or who.pid_namespace != here.pid_namespace:
        return False
    started = provenance.pid_started(who.pid)
    return started is None or abs(started - who.pid_started) > SAME_SECONDS


def _of_one_machine(who: ProcessRecord, here: ProcessRecord) -> bool:
    return who.host == here.host if here.boot_id is None else who.boot_id == here.boot_id


@contextlib.contextmanager
def unless_held(folder: Path) -> Iterator[bool]:
    """Whether nobody holds a run's folder; if so, nobody can inside the block."""
    lock, is_free = FileLock(folder / LOCK_FILE), True
    if Path(lock.lock_file).is_file():  # else it is a copy
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # a lock of another user's cannot be opened: left alone
            is_free = False
    try:
        yield is_free
    finally:
        lock.release()


def mark_dead() -> list[Run]:
    """Write KILLED where a run says RUNNING and its process is no more; returns these runs, oldest first."""
    dead = []
    for run in all_runs():
        if run.status == Status.RUNNING and not is_alive(run):
            with unless_held(run.folder) as is_free:
                resumable = (run.folder / "config.yaml").is_file()  # else it had not begun
                try:
                    if is_free and run.status == Status.RUNNING:  # else resumed, or ended, since it was looked at
                        records.write(replace(run.result(), status=Status.KILLED, resumable=resumable), run.folder)
                        dead.append(run)
                except OSError as error:
                    log.info("%s: its process is gone, but KILLED cannot be written (%s)", run.folder, error)
    return dead
