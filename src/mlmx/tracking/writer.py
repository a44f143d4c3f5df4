"""A run's way to MLflow: a thread of its own, so that training never waits for a store or a server."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlmx.tracking import Store
    from mlmx.tracking.mlflow_run import MlflowRun

log = logging.getLogger("mlmx")

SEND_EVERY_SECONDS = 1.0
RETRY_AFTER_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
READ_BYTES = 65_536  # of metrics.jsonl at a time: some 1,000 points, the most that MLflow takes in one call
PATIENCE_SECONDS = 5.0  # at the end of a run, for an MLflow that is away
STALL_SECONDS = 300.0  # at the end of a run, for one deed of an MLflow that answers (weights on their way to a server)

Deed = Callable[["MlflowRun"], None]


class Writer:
    """Sends the numbers of metrics.jsonl, and what else is to be done in MLflow, in the order they came.

    The file is the queue: the thread reads on from where it has sent, so that memory stays bounded and nothing is lost
    while MLflow is away. Numbers go about once a second. Deeds (files, checkpoints) are done at once, after the
    numbers logged before them. Whatever fails is tried again, later and later. A point whose first sending had arrived
    after all is not doubled: the store knows it by key, step, time and value.

    Args:
        opened: called in the thread with the id of the MLflow run, once there is one.
    """

    def __init__(self, store: Store, metrics: Path, opened: Callable[[str], None]) -> None:
        self.store = store
        self.metrics = metrics
        self.opened = opened
        self.asked: tuple[str, dict[str, str], int] | None = None
        self.mlflow: MlflowRun | None = None
        self.deeds: deque[tuple[str, Deed]] = deque()
        self.sent_bytes = 0
        self.failures = 0  # in a row
        self.reason = ""
        self.status: str | None = None
        self.heard = time.monotonic()
        self.given_up = self.done = False
        self.something, self.at_once = threading.Event(), threading.Event()
        self.something.set()
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    def start(self, name: str, tags: Mapping[str, str]) -> None:
        """Ask for the MLflow run; until then the thread loads MLflow and opens its store."""
        self.asked = (name, dict(tags), int(time.time() * 1000))
        self._wake()

    def log(self) -> None:
        """metrics.jsonl has another line."""
        self.something.set()

    def do(self, what: str, deed: Deed) -> None:
        """Do this after the numbers logged so far."""
        self.deeds.append((what, deed))
        self._wake()

    def finish(self, status: str) -> None:
        """Send what is left and close the run; an MLflow that is away is waited for a few seconds only."""
        self.status, self.heard = status, time.monotonic()
        self._wake()
        while self.thread.is_alive():
            patience = PATIENCE_SECONDS if self.failures else STALL_SECONDS
            left = self.heard + patience - time.monotonic()
            if left <= 0:
                self.given_up = True
                break
            self.thread.join(min(left, 0.5))
        if not self.done:
            self._say_unsent()

    def _wake(self) -> None:
        self.something.set()
        self.at_once.set()

    # ------------------------------------------------------------------------------ in the thread

    def _work(self) -> None:
        while not (self.given_up or self.done):
            self.something.wait()
            self.something.clear()
            self.at_once.clear()
            try:
                self._catch_up()
                self._say_back()
                pause = SEND_EVERY_SECONDS
            except Exception as error:
                self._say_away(error)
                pause = RETRY_AFTER_SECONDS[min(self.failures, len(RETRY_AFTER_SECONDS)) - 1]
                self.something.set()
            if not self.done:
                self.at_once.wait(pause if self.status is None else min(pause, 1.0))

    def _catch_up(self) -> None:
        """Everything up to now: the numbers, the deeds that were asked for before them, and the end."""
        from mlmx.tracking.mlflow_run import MlflowRun, connect

        status, due = self.status, len(self.deeds)  # looked at before the file: they come after its numbers
        if self.mlflow is None:
            client, experiment = connect(self.store)
            if self.asked is None:
                self.done = status is not None
                return
            self.mlflow = MlflowRun(client, experiment, *self.asked, again=self.failures > 0)
            self.opened(self.mlflow.run_id)
        while lines := self._unsent():
            self.mlflow.log([json.loads(line) for line in lines])
            self.sent_bytes += sum(map(len, lines))
            self.heard = time.monotonic()
        for _ in range(due):
            self._do(self.mlflow, *self.deeds[0])
            self.deeds.popleft()
            self.heard = time.monotonic()
        if status is not None:
            self.mlflow.finish(status)
            self.done = True

    def _unsent(self) -> list[bytes]:
        """The next lines that have not been sent; one that is still being written is left for later."""
        with self.metrics.open("rb") as file:
            file.seek(self.sent_bytes)
            lines = file.readlines(READ_BYTES)
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]

    def _do(self, mlflow: MlflowRun, what: str, deed: Deed) -> None:
        """A deed that fails twice while MLflow answers is refused: it is said and left out, and the rest goes on."""
        for last in (False, True):
            try:
                deed(mlflow)
                return
            except Exception as error:
                mlflow.ping()
                if last:
                    log.warning("MLflow did not take %s (%s)", what, _brief(error))

    # ------------------------------------------------------------------------------------- speech

    def _say_away(self, error: Exception) -> None:
        self.failures += 1
        self.reason = _brief(error)
        if self.failures == 2:  # the first one may be a connection that had gone stale
            away = "MLflow cannot be reached (%s); the run goes on, every number is in %s and is sent when it is back"
            log.warning(away, self.reason, self.metrics)

    def _say_back(self) -> None:
        if self.failures >= 2:
            log.info("MLflow is back and has every number up to here")
        self.failures = 0

    def _say_unsent(self) -> None:
        with self.metrics.open("rb") as file:
            file.seek(self.sent_bytes)
            points = sum(len(json.loads(line)) - len(("step", "time")) for line in file)
        missing = [f"{points:,} points", *(what for what, _ in list(self.deeds)), "how it ended"]
        log.warning(
            "MLflow did not get all of this run (%s); missing there: %s; all of it is in %s",
            self.reason or "no answer",
            ", ".join(missing),
            self.metrics.parent,
        )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
