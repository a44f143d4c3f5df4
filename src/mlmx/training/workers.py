"""Processes that load batches, and signals that come to all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mlmx.runs.signals import SIGNALS


class Workers:
    """Those of a training's loader: they outlive a signal to every process, since they are needed to end a step."""

    def __init__(self) -> None:
        self.left = multiprocessing.RawValue("b", 0)  # shared with them

    def prepare(self, loader: Any) -> None:
        """Those that this loader will start, or the one that accelerate has wrapped."""
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(_outlive_signals, inner.worker_init_fn, self.left)

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """Around a training: behind it, a signal ends them."""
        self.left.value = 0
        try:
            yield
        finally:
            self.left.value = 1


def _outlive_signals(begin: Callable[[int], None] | None, left: Any, worker: int) -> None:
    """Set up a worker: what ends it is its loader, or a signal once training was left."""

    def arrived(number: int, frame: object) -> None:
        if left.value:
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, arrived)
    if begin is not None:
        begin(worker)
