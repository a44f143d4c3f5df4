"""What a run says: lines on stdout and in its train.log, without secrets."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from mlmx.config.redaction import RedactedStream, redact
from mlmx.runs.run import Run

log = logging.getLogger("mlmx")


class _Stdout(logging.StreamHandler[TextIO]):
    """Looks stdout up at each line: a progress bar, or a test, may have put its own in place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout.stream if isinstance(sys.stdout, RedactedStream) else sys.stdout


class _LogFile(logging.FileHandler):
    """A full disk takes lines of the log, not the run: what a run cannot do without says so itself."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_to() -> Iterator[None]:
    """Lines of the ``mlmx`` logger on stdout inside the block, once also where it is within another."""
    if any(isinstance(handler, _Stdout) for handler in log.handlers):
        yield
        return
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    with _handled(_Stdout() if first else logging.NullHandler()):
        yield


@contextlib.contextmanager
def log_to_file(run: Run) -> Iterator[None]:
    """Lines of the ``mlmx`` logger in the run's ``train.log``, with the time."""
    handler = _LogFile(run.folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    with contextlib.closing(handler), _handled(handler):
        yield


@contextlib.contextmanager
def _handled(handler: logging.Handler) -> Iterator[None]:
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addFilter(_without_secrets)  # once, however often it is asked for
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _without_secrets(record: logging.LogRecord) -> bool:
    """Takes secrets out of a record once, for whoever shows it, also where an exception of a library is quoted."""
    record.msg, record.args = redact(record.getMessage()), None
    if record.exc_info:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return True
