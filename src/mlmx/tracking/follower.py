"""Beside a training: its mirror in a thread of its own, so that training never waits for a store or a server."""

from __future__ import annotations

import logging
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping

from mlmx.config.errors import brief
from mlmx.runs.metrics_file import rows_of
from mlmx.runs.run import Run
from mlmx.tracking.mirror import ENDING, Deed, Mirror, batches, record_of
from mlmx.tracking.store import Store, trouble

log = logging.getLogger("mlmx")

SEND_EVERY_SECONDS = 1.0
RETRY_AFTER_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
LINES_AT_ONCE = 64  # that do not wait for the second to pass, so that little is left for the end of a run
PATIENCE_SECONDS = 5.0  # at the end of a run, for an MLflow that is away
STALL_SECONDS = 300.0  # at the end of a run, for one thing of an MLflow that answers (weights on their way to a server)


class Follower:
    """Calls for updates until the run has ended.

    The file is the queue: memory stays bounded and nothing is lost while MLflow is away. Numbers go about once a
    second, many of them sooner; the rest at once, after the numbers logged before it. Whatever fails is tried again,
    later and later. ``opened`` is called in the thread with the id of the MLflow run, once there is one.
    """

    def __init__(self, run: Run, store: Store, opened: Callable[[str], None]) -> None:
        self.mirror = Mirror(run, store, opened)
        self.mirror.goes_on = True
        self.by_hand = f"later: python -m mlmx sync run={shlex.quote(str(run.folder))}"
        self.begun = self.ending = self.given_up = self.done = False
        self.refused: set[str] = set()  # to be tried once more at the end
        self.waiting_lines = 0
        self.failures, self.reason = 0, ""  # in a row
        self.failed_to_end = False  # the last attempt, which was one to finish
        self.something, self.at_once = threading.Event(), threading.Event()
        self.something.set()
        # How long training waits for Python when this thread has it; by default ten times as long.
        sys.setswitchinterval(min(0.0005, sys.getswitchinterval()))
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    def start(self) -> None:
        """There is something to follow; until then the thread loads MLflow and opens its store."""
        self.begun = True
        self.look()

    def log(self) -> None:
        """metrics.jsonl has another line."""
        self.waiting_lines += 1
        if not self.something.is_set():  # the thread clears it before it reads; setting it costs as much as the line
            self.something.set()
        if self.waiting_lines >= LINES_AT_ONCE and not self.failures:
            self.at_once.set()

    def look(self) -> None:
        """The folder has something else that is new."""
        self.mirror.changed = True
        self.something.set()
        self.at_once.set()

    def finish(self) -> None:
        """Bring what is left, as the run has ended; one that is away is asked once more and waited for a little."""
        self.begun = self.begun or record_of(self.mirror.run) is not None
        self.mirror.heard = time.monotonic()
        self.ending = True
        self.look()
        while self.thread.is_alive() and self.begun:
            patience = PATIENCE_SECONDS if self.failed_to_end else STALL_SECONDS
            if (left := self.mirror.heard + patience - time.monotonic()) <= 0:
                break
            self.thread.join(min(left, 0.5))
        self.given_up = not self.done
        if self.begun and not self.done:
            mirror = self.mirror
            rows = (row for lines in batches(mirror.metrics, mirror.sent_bytes) for row in rows_of(lines))
            points = sum(len(row) - len(("step", "time")) for row in rows)
            missing = ", ".join([f"{points:,} points", *(thing.name for thing in mirror.lacking())])
            unsent = "MLflow did not get all of this run (%s); missing there: %s; all of it is in %s; %s"
            log.warning(unsent, self.reason or "no answer", missing, mirror.run.folder, self.by_hand)

    def _work(self) -> None:
        while not (self.given_up or self.done):
            self.something.wait()
            self.something.clear()
            self.at_once.clear()
            self.waiting_lines = 0
            ending = self.ending  # looked at before the folder
            try:
                if ending:
                    self.mirror.changed = True
                    for name in self.refused:
                        self.mirror.brought.pop(name, None)
                    self.refused = set()
                if self.begun:
                    self.mirror.update(self._bring)
                    self.done = ending
                else:
                    self.mirror.connect()
                if self.failures >= 2:
                    log.info("MLflow is back and has every number up to here")
                self.failures, pause = 0, SEND_EVERY_SECONDS
            except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
                self.failures, self.reason = self.failures + 1, brief(error)
                if self.failures == 2:  # the first one may be a connection that had gone stale
                    self.reason = trouble(self.mirror.store) or self.reason
                    goes_on = "the run goes on, every number is in %s and is sent when it is back"
                    log.warning(f"MLflow cannot be reached (%s); {goes_on}", self.reason, self.mirror.metrics)
                self.failed_to_end = ending
                pause = RETRY_AFTER_SECONDS[min(self.failures, len(RETRY_AFTER_SECONDS)) - 1]
            if self.failures or self.mirror.scored:
                self.something.set()
            if not self.done:
                self.at_once.wait(pause if not self.ending else min(pause, 1.0))

    def _bring(self, name: str, deed: Deed) -> Mapping[str, int]:
        """What fails twice while MLflow answers is refused: said, and tried again at the end of the run.

        How the run ended is never refused: nothing comes after it, and a busy database says so more than twice.
        """
        if name == ENDING:
            return deed()
        for last in (False, True):
            try:
                return deed()
            except Exception as error:  # noqa: BLE001 (of many kinds, from MLflow's and its database's)
                assert self.mirror.mlflow is not None
                self.mirror.mlflow.ping()
                if last:
                    then = self.by_hand if self.ending else "it is tried again at the end of the run"
                    log.warning("MLflow did not take %s (%s); %s", name, brief(error), then)
                    self.refused.add(name)
        return {}
