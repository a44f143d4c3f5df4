"""What a person is told in one line: a wrong request, or work that failed in a way that is understood."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class RequestError(ValueError):
    """The request was wrong: one line saying what was given, what is allowed and what to do."""


class WorkError(RuntimeError):
    """The work failed in a way that is understood: one line saying what happened and what to do."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the nearest choice; nothing where none is near, or the word is one of them.

    >>> did_you_mean("chunk_sze", ["chunk_size", "lr"])
    '; did you mean chunk_size?'
    """
    known = list(choices)
    near = [] if word in known else difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def require(ok: bool, message: str) -> None:
    """Raise `RequestError` with ``message`` unless ``ok``."""
    if not ok:
        raise RequestError(message)


def path_of(key: str, given: str) -> Path:
    """A path as it was given, ``~`` expanded; refused if none: too long a name, a NUL in it, an unknown user."""
    try:
        path = Path(given).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(f"{key}={given}: cannot be looked up ({error}); give another path") from error
    return path


def brief(error: Exception) -> str:
    """An error in one line, and not a long one."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
