"""``metrics.jsonl``: every number of a run, a line of JSON per logging. What MLflow has comes from here."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any


class MetricsFile:
    """``metrics.jsonl`` of a run folder, kept open for more lines; what follows its last whole line is cut off.

    A line has left the process when `append` returns, so that killing it loses none; it is not waited for until it is
    on the disk, so that a power cut may take the last ones.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.file = self.path.open("a+b", buffering=0)
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        while lines and not rows_of(lines[-1:]):  # what a process killed while writing, or a power cut, leaves behind
            lines.pop()
        self.size = sum(map(len, lines))
        self.file.truncate(self.size)
        self.zone = datetime.now().astimezone().tzinfo  # asking for it at each line takes as long as writing one
        self.second, self.date = 0, ""

    def append(self, step: int, epoch: float, metrics: Mapping[str, float]) -> dict[str, Any]:
        """One line, whole or not at all where it cannot be written (a full disk, say); returns its row."""
        now = time.time()
        second = int(now)
        if second != self.second:  # asking for isoformat at each line takes as long as writing one, too
            self.second, self.date = second, datetime.fromtimestamp(second, self.zone).isoformat()
        moment = f"{self.date[:19]}.{int((now - second) * 1e6):06}{self.date[19:]}"
        epoch = round(epoch * 1e6) / 1e6  # the same as round(epoch, 6), in a third of the time
        row = {"step": step, "epoch": epoch, "time": moment, **metrics}
        line, written = memoryview((json.dumps(row) + "\n").encode()), 0
        try:
            while written < len(line):
                written += self.file.write(line[written:])
        except OSError as error:
            self.file.truncate(self.size)  # half a line would spoil the next one
            error.filename = str(self.path)
            raise
        self.size += written
        return row

    def close(self) -> None:
        """No more lines."""
        self.file.close()


def loss_of(metrics: Mapping[str, float]) -> float:
    """What a run is judged by: ``heldout/loss``, or ``eval/loss`` where nothing is held out; NaN without either."""
    return float(metrics.get("heldout/loss", metrics.get("eval/loss", math.nan)))


def rows_of(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The rows of lines of ``metrics.jsonl``; what is no whole line of JSON is left out."""
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line) if line.endswith(b"\n") else None
            rows += [row] if isinstance(row, dict) else []
    return rows
