"""Each side in a process of its own, asked for work by messages, one side at a time.

A message is a line of JSON: ``["steps", {"count": 1}]`` → ``{"value": 1.73}`` or ``{"error": "…"}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

SCRIPT = Path(__file__).resolve().parents[1] / "benchmark.py"
MODULES = {"stock": "benchmark.stock", "mlmx": "benchmark.ours"}
SIDES = tuple(MODULES)


class WorkerError(RuntimeError):
    """A side could not do what it was asked for."""


# ------------------------------------------------------------------------------------- in the worker


class Channel:
    """The worker's end: what libraries print must not come between the messages."""

    def __init__(self, source: TextIO, sink: TextIO) -> None:
        self.source = source
        self.sink = sink

    def receive(self) -> tuple[str, dict[str, Any]]:
        """The next thing asked for; where nobody is there to ask any more, the process ends."""
        line = self.source.readline()
        if not line:
            os._exit(0)
        name, given = json.loads(line)
        return name, given

    def send(self, value: Any) -> None:
        self.sink.write(json.dumps({"value": value}) + "\n")
        self.sink.flush()

    def send_error(self, text: str) -> None:
        self.sink.write(json.dumps({"error": text}) + "\n")
        self.sink.flush()


def serve(side: str) -> None:
    """Answer one request after the other with the functions of a side's module."""
    channel = Channel(os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # As every command does where nothing else is at work: here the other side waits. The recipe sets nothing.
    if side == "mlmx":
        import_module("mlmx.kernels.threads").set_waiting(awake=True)
    functions = import_module(MODULES[side])
    while True:
        name, given = channel.receive()
        try:
            channel.send(getattr(functions, name)(channel, **given))
        except Exception:  # noqa: BLE001 (whatever it is, the parent shows it)
            channel.send_error(traceback.format_exc())


# ------------------------------------------------------------------------------------- in the parent


class Worker:
    """A running side; `ask` waits for its answer, `send` and `receive` do the halves of that."""

    def __init__(self, side: str, folder: Path) -> None:
        self.side = side
        self.log = folder / f"{side}.log"
        own = {"MLMX_OUTPUTS": str(folder / "outputs"), "HF_HOME": str(folder / "hf"), "MLMX_DEBUG": "1"}
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--worker", side],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | own,
            )

    def send(self, name: str, **given: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says that it is gone
            self.process.stdin.write(json.dumps([name, given]) + "\n")
            self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip()[-400:]
            raise WorkerError(f"{self.side}: its process ended with {self.process.wait()}; last words: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.side}: {answer['error']}")
        return answer["value"]

    def ask(self, name: str, **given: Any) -> Any:
        self.send(name, **given)
        return self.receive()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Pair:
    """Both sides. Whatever is timed is asked `in_turn`; what only prepares is asked `together`."""

    def __init__(self, folder: Path) -> None:
        self.workers = {side: Worker(side, folder) for side in SIDES}

    def in_turn(self, name: str, **given: Any) -> dict[str, Any]:
        """Stock first, then mlmx; the other one waits."""
        return {side: worker.ask(name, **given) for side, worker in self.workers.items()}

    def together(self, name: str, **given: Any) -> dict[str, Any]:
        for worker in self.workers.values():
            worker.send(name, **given)
        return {side: worker.receive() for side, worker in self.workers.items()}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Pair]:
    """A fresh pair that ends with the block."""
    pair = Pair(folder)
    try:
        yield pair
    finally:
        pair.close()
