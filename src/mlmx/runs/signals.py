"""Signals that end a program: at once where nothing can be lost by it, at the end of a step where something can.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 (Slurm's warning before a time limit) raise `Interrupted` in the main thread.
Inside `deferred` the first one is only noted, for the code in it to stop where its work is safe; the second ends the
process on the spot, without another line of Python. Where jobs run in processes of their own, `passed_on` gives it to
them, and `in_worker` is what they do with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
UNHANDLED = (signal.SIG_DFL, signal.default_int_handler)


class Interrupted(BaseException):
    """The program was asked to end, with exit code 130 by SIGINT, 129 by SIGHUP, 143 by SIGTERM and SIGUSR1."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.code = 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)

    def __str__(self) -> str:
        return f"interrupted by {self.name}"


@dataclass
class _Asked:
    """What was asked of this process, and whether it is noted or raised."""

    number: int | None = None
    deferring: bool = False
    passing: bool = False  # to the child processes
    handling: bool = False
    patient: bool = False  # another process says when to end on the spot
    working: bool = False  # for that process


_asked = _Asked()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """The signals inside the block are ours. What is ignored stays ignored (nohup), and only the main thread may."""
    before = _taken() if threading.current_thread() is threading.main_thread() else {}
    try:
        with _set(handling=True):
            yield
    finally:
        if before:  # else they are another block's, around this one
            _asked.number = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _set(**flags: bool) -> Iterator[None]:
    before = {name: getattr(_asked, name) for name in flags}
    vars(_asked).update(flags)
    try:
        yield
    finally:
        vars(_asked).update(before)


def _taken() -> dict[signal.Signals, Any]:
    return {number: signal.signal(number, _arrived) for number in SIGNALS if signal.getsignal(number) in UNHANDLED}


def _arrived(number: int, frame: object) -> None:
    again, _asked.number = _asked.number is not None, number
    if again and _asked.patient and _asked.working:
        return  # a terminal gives it to the whole group, and the parent passes it on
    children = multiprocessing.active_children() if _asked.passing else []
    for child in children:
        assert child.pid is not None  # it was started
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(child.pid, signal.SIGKILL if again else number)
    if again and _asked.deferring:
        os._exit(Interrupted(number).code)
    if not _asked.deferring or (_asked.passing and not children):
        raise Interrupted(number)


def deferred() -> contextlib.AbstractContextManager[None]:
    """Inside the block a signal is noted, not raised: see `raise_noted`."""
    return _set(deferring=True)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside the block, within `deferred`, a signal is raised again, and so is one that was noted before."""
    with _set(deferring=False):
        raise_noted()
        yield


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """Around jobs in child processes: they get the signal, raised when they are done; a second one ends all at once."""
    try:
        with _set(passing=True, deferring=True):
            yield
    except Exception:
        raise_noted()  # a child that was not ready for it has died of it
        raise
    raise_noted()


def is_worker() -> bool:
    """Whether this process runs jobs of another, which handles the signals of the command."""
    return _asked.patient or not _asked.handling


@contextlib.contextmanager
def in_worker() -> Iterator[None]:
    """Around a job in such a process: a signal is raised in it once, or at its beginning if it came before.

    The signals are ours from then on. What ends one job ends those after it, too.
    """
    if not _asked.patient:
        _asked.patient = _asked.deferring = True
        _taken()
    with _set(working=True), at_once():
        yield


def noted() -> bool:
    """Whether a signal has come."""
    return _asked.number is not None


def raise_noted() -> None:
    """Raise the signal that was noted, if there is one."""
    if _asked.number is not None:
        raise Interrupted(_asked.number)
