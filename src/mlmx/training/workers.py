"""Signals that come to every process of a run, also to those that load its batches."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from ctypes import c_byte

from mlmx.runs.signals import SIGNALS


def outlive_signals(begin: Callable[[int], None] | None, left: c_byte, worker: int) -> None:
    """Set up a worker, besides by ``begin``: its loader ends it, or a signal once training was ``left`` (not 0).

    Until then it is needed to end a step.
    """

    def arrived(number: int, frame: object) -> None:
        if left.value:
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, arrived)
    if begin is not None:
        begin(worker)
