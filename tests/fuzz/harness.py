"""One command line in this process: its exit code, what it wrote and where, within a limit of processor time."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings

from mlmx.commands.main import main

CPU_SECONDS = 30.0  # of one command line; other work on the machine does not count


def examples(number: int) -> settings:
    """So many examples, the same each time; how long one takes is looked after by `Bench.run`."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


class HangError(BaseException):
    """The command line used up its processor time."""


@contextlib.contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Ends the block with `HangError` after so much processor time (pytest-timeout has the clock's own alarm)."""

    def give_up(number: int, frame: object) -> None:
        raise HangError(f"more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclass(frozen=True)
class Ending:
    """How a command line ended; ``written`` are new paths below the outputs and the working folder."""

    code: int
    out: str
    err: str
    written: list[str]


@dataclass(frozen=True)
class Bench:
    """A working folder, and an outputs folder that is empty before each command line."""

    folder: Path
    outputs: Path

    def run(self, arguments: Sequence[str], stdin: str = "", keep: bool = False) -> Ending:
        """The command line as a process sees it: streams that hold UTF-8 only, no terminal.

        Args:
            keep: leave what the outputs folder holds.
        """
        if not keep:
            shutil.rmtree(self.outputs, ignore_errors=True)
        before = set(self._files())
        # As Python sets them up: surrogates are an error on stdout, and written as escapes on stderr.
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
        with (
            contextlib.chdir(self.folder),
            mock.patch.dict(os.environ, {"MLMX_OUTPUTS": str(self.outputs)}),
            mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            processor_time(CPU_SECONDS),
        ):
            code = main(arguments)
        made = sorted(str(path) for path in self._files() if path not in before)
        return Ending(code, _text(out), _text(err), made)

    def _files(self) -> list[Path]:
        return [*self.folder.rglob("*"), *self.outputs.rglob("*")]


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


def complaint(ending: Ending) -> str | None:
    """What is wrong with how a command line ended, if anything: the law of this folder.

    Exit code 0 or 2 where no work was done; on 2 one line on stderr, and nothing left behind; never a traceback.
    """
    if ending.code not in (0, 2):
        return f"exit code {ending.code}"
    return misspoken(ending)


def misspoken(ending: Ending) -> str | None:
    """What is wrong with what a command line said and left behind, whatever its exit code."""
    if "Traceback" in ending.err + ending.out:
        return "a traceback"
    if ending.code == 0:
        return None if ending.err == "" else "words on stderr beside exit code 0"
    if not (ending.err.startswith("mlmx: ") and ending.err.endswith("\n") and len(ending.err.splitlines()) == 1):
        return "not one line"
    if not ending.err.removesuffix("\n").isprintable():
        return "control characters on stderr"
    if len(ending.err) > LONGEST_LINE:
        return f"a line of {len(ending.err)} characters"
    return f"left behind: {ending.written}" if ending.code == 2 and ending.written else None


LONGEST_LINE = 2000
