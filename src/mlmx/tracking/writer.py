"""A run's way to MLflow: a thread of its own, so that training never waits for a store or a server."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import brief
from mlmx.runs.metrics_file import rows_of
from mlmx.tracking.store import file_of, require_still, trouble

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from mlmx.tracking.mlflow_run import MlflowRun
    from mlmx.tracking.store import Store
    from mlmx.tracking.system import Sample

log = logging.getLogger("mlmx")

SEND_EVERY_SECONDS = 1.0
RETRY_AFTER_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
READ_BYTES = 65_536  # of metrics.jsonl at a time: some 1,000 points
LINES_AT_ONCE = 64  # that do not wait for the second to pass, so that little is left for the end of a run
PATIENCE_SECONDS = 5.0  # at the end of a run, for an MLflow that is away
SWITCH_SECONDS = 0.0005  # how long training waits for Python when this thread has it; by default ten times as long
STALL_SECONDS = 300.0  # at the end of a run, for one deed of an MLflow that answers (weights on their way to a server)

Deed = Callable[["MlflowRun"], object]


class Writer:
    """Sends the numbers of metrics.jsonl, and what else is to be done in MLflow, in the order they came.

    The file is the queue: the thread reads on from where it has sent, so that memory stays bounded and nothing is lost
    while MLflow is away. Numbers go about once a second, many of them sooner. Deeds (files, checkpoints) are done at
    once, after the numbers logged before them. Whatever fails is tried again, later and later. A point whose first
    sending had arrived after all is not doubled: the store knows it by key, step, time and value. What MLflow has of a
    resumed run is not sent again.

    Args:
        opened: called in the thread with the id of the MLflow run, once there is one.
    """

    def __init__(self, store: Store, metrics: Path, opened: Callable[[str], None]) -> None:
        self.store = store
        self.metrics = metrics
        self.opened = opened
        self.told: Mapping[str, Any] | None = None
        self.resumed = False
        self.mlflow: MlflowRun | None = None
        self.connected: tuple[MlflowClient, str] | None = None
        self.file: tuple[int, int] | None = None  # of a local store
        self.samples: deque[Sample] = deque()  # of the machine
        self.deeds: deque[tuple[str, Deed]] = deque()
        self.refused: list[tuple[str, Deed]] = []  # to be tried once more at the end
        self.sent_bytes = 0
        self.waiting_lines = 0
        self.failures = 0  # in a row
        self.reason = ""
        self.ending: tuple[str, bool, int] | None = None
        self.failed_to_end = False  # the last attempt, which was one to finish
        self.heard = time.monotonic()
        self.given_up = self.done = False
        self.something, self.at_once = threading.Event(), threading.Event()
        self.something.set()
        sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    def start(self, told: Mapping[str, Any], resumed: bool) -> None:
        """Ask for the MLflow run of mlflow.json; until then the thread loads MLflow and opens its store.

        Args:
            resumed: it was asked for by an earlier process, and is opened again.
        """
        self.resumed, self.told = resumed, told
        self._wake()

    def log(self) -> None:
        """metrics.jsonl has another line."""
        self.waiting_lines += 1
        if not self.something.is_set():  # the thread clears it before it reads; setting it costs as much as the line
            self.something.set()
        if self.waiting_lines >= LINES_AT_ONCE and not self.failures:
            self.at_once.set()

    def do(self, what: str, deed: Deed) -> None:
        """Do this after the numbers logged so far."""
        self.deeds.append((what, deed))
        self._wake()

    def finish(self, status: str, resumable: bool, ended: int) -> None:
        """Send what is left and close the run; an MLflow that is away is asked once more and waited for a few seconds.

        Args:
            resumable: whether a run that ended early can go on.
            ended: milliseconds since 1970.
        """
        self.ending, self.heard = (status, resumable, ended), time.monotonic()
        self._wake()
        while self.thread.is_alive():
            patience = PATIENCE_SECONDS if self.failed_to_end else STALL_SECONDS
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
            self.waiting_lines = 0
            ending = self.ending  # looked at before the file, as the deeds are: they come after its numbers
            try:
                self._catch_up(ending)
                self._say_back()
                pause = SEND_EVERY_SECONDS
            except Exception as error:
                self._say_away(error)
                self.connected = None
                self.failed_to_end = ending is not None
                pause = RETRY_AFTER_SECONDS[min(self.failures, len(RETRY_AFTER_SECONDS)) - 1]
                self.something.set()
            if not self.done:
                self.at_once.wait(pause if self.ending is None else min(pause, 1.0))

    def _catch_up(self, ending: tuple[str, bool, int] | None) -> None:
        """Everything up to now: the numbers, the deeds that were asked for before them, and the end."""
        from mlmx.tracking.mlflow_run import MlflowRun, connect

        if ending is not None:
            self.deeds.extend(self.refused)
            self.refused = []
        due = len(self.deeds)
        if self.mlflow is None:
            self.connected = self.connected or connect(self.store)
            self.file = file_of(self.store)  # before anyone hears of the run and could move the store away
            if self.told is None:
                self.done = ending is not None
                return
            mlflow = MlflowRun(*self.connected, self.told, again=self.resumed or self.failures > 0)
            if self.resumed:
                mlflow.reopen()
            self.opened(mlflow.run_id)
            self.mlflow = mlflow
        require_still(self.store, self.file)
        for lines in batches(self.metrics, self.sent_bytes):
            self.mlflow.log(rows_of(lines))
            self.sent_bytes += sum(map(len, lines))
            self.heard = time.monotonic()
        if self.mlflow.has:  # a file that was lost in part, or put back from a copy, has its later steps to repeat
            self.mlflow.has = {point for point in self.mlflow.has if point[1] >= self.mlflow.epoch_at}
        if samples := list(self.samples):
            self.mlflow.log_samples(samples)
            for _ in samples:
                self.samples.popleft()
        for _ in range(due):
            self._do(self.mlflow, *self.deeds[0])
            self.deeds.popleft()
            self.heard = time.monotonic()
        if ending is not None:
            self.mlflow.finish(*ending)
            self.done = True

    def _do(self, mlflow: MlflowRun, what: str, deed: Deed) -> None:
        """A deed that fails twice while MLflow answers is refused: said, and tried again at the end of the run."""
        for last in (False, True):
            try:
                deed(mlflow)
                return
            except Exception as error:
                mlflow.ping()
                if last:
                    self._say_refused(what, error)
                    if not isinstance(error, FileNotFoundError):  # what was deleted meanwhile will not come back
                        self.refused.append((what, deed))

    # ------------------------------------------------------------------------------------- speech

    def _say_away(self, error: Exception) -> None:
        self.failures += 1
        self.reason = brief(error)
        if self.failures == 2:  # the first one may be a connection that had gone stale
            self.reason = trouble(self.store) or self.reason
            away = "MLflow cannot be reached (%s); the run goes on, every number is in %s and is sent when it is back"
            log.warning(away, self.reason, self.metrics)

    def _say_back(self) -> None:
        if self.failures >= 2:
            log.info("MLflow is back and has every number up to here")
        self.failures = 0

    def _say_refused(self, what: str, error: Exception) -> None:
        then = "it is tried again at the end of the run" if self.ending is None else self._by_hand()
        log.warning("MLflow did not take %s (%s); %s", what, brief(error), then)

    def _say_unsent(self) -> None:
        rows = (row for lines in batches(self.metrics, self.sent_bytes) for row in rows_of(lines))
        points = sum(len(row) - len(("step", "time")) for row in rows)
        missing = [f"{points:,} points", *(what for what, _ in list(self.deeds)), "how it ended"]
        log.warning(
            "MLflow did not get all of this run (%s); missing there: %s; all of it is in %s; %s",
            self.reason or "no answer",
            ", ".join(missing),
            self.metrics.parent,
            self._by_hand(),
        )

    def _by_hand(self) -> str:
        return f"later: python -m mlmx sync run={shlex.quote(str(self.metrics.parent))}"


def batches(metrics: Path, start: int) -> Iterator[list[bytes]]:
    """Lines of metrics.jsonl from a byte on, up to its length now; one that is being written is left for later.

    They are on the disk when they are given: MLflow must not know a number that a power cut could take from the file.
    """
    with metrics.open("rb") as file:
        end = os.fstat(file.fileno()).st_size  # what is added meanwhile waits: it must not keep anything else waiting
        file.seek(start)
        os.fsync(file.fileno())
        while file.tell() < end and (lines := file.readlines(min(READ_BYTES, end - file.tell()))):
            if whole := [line for line in lines if line.endswith(b"\n")]:
                yield whole
            if len(whole) < len(lines):
                return
