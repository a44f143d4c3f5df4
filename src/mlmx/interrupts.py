"""Signals that end a program: at once where nothing can be lost by it, at the end of a step where something can.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 (Slurm's warning before a time limit) raise `Interrupted` in the main thread.
Inside `deferred` the first one is only noted, for the code in it to stop where its work is safe; the second ends the
process on the spot, without another line of Python.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(BaseException):
    """The program was asked to end.

    Attributes:
        code: the exit code: 130 for SIGINT, 129 for SIGHUP, 143 for SIGTERM and SIGUSR1.
    """

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


_asked = _Asked()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """The signals inside the block are ours. What is ignored stays ignored (nohup), and only the main thread may."""
    main = threading.current_thread() is threading.main_thread()
    ours = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in SIGNALS if main and signal.getsignal(number) in ours}
    for number in before:
        signal.signal(number, _arrived)
    try:
        yield
    finally:
        if before:  # else they are another block's, around this one
            _asked.number = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _arrived(number: int, frame: object) -> None:
    again, _asked.number = _asked.number is not None, number
    if again and _asked.deferring:
        os._exit(Interrupted(number).code)
    if not _asked.deferring:
        raise Interrupted(number)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside the block a signal is noted, not raised: see `raise_noted`."""
    before, _asked.deferring = _asked.deferring, True
    try:
        yield
    finally:
        _asked.deferring = before


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside the block, within `deferred`, a signal is raised again, and so is one that was noted before."""
    before, _asked.deferring = _asked.deferring, False
    try:
        raise_noted()
        yield
    finally:
        _asked.deferring = before


def noted() -> bool:
    """Whether a signal has come."""
    return _asked.number is not None


def raise_noted() -> None:
    """Raise the signal that was noted, if there is one."""
    if _asked.number is not None:
        raise Interrupted(_asked.number)
