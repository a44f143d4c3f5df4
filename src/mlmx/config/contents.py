"""What no config may hold, wherever a value comes from: code to run, the switch for remote code, and secrets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlmx.config.requests import RequestError, require
from mlmx.config.trust import TRUST_FLAG
from mlmx.redaction import exposed, redact

MOST_BITS = 4096  # of a whole number


def refuse_code(values: Any) -> None:
    """Refuse a plain, resolved config that could run code: names are looked up in tables, never imported.

    Raises:
        RequestError: ``_target_`` or ``trust_remote_code`` anywhere in it.
    """
    for path, key, _ in _entries(values, ""):
        require(
            key != "_target_",
            f"{redact(path)}: a config names functions by 'name:', _target_ is not accepted; "
            "your own functions come in through the entry point group mlmx.plugins",
        )
        require(
            "trust_remote_code" not in key,
            f"{redact(path)}: cannot be switched on by a config; name the repository on the command line: "
            f"{TRUST_FLAG}=owner/name@<40 hexadecimal digits>",
        )


def refuse_secrets(values: Any) -> None:
    """Refuse a plain config that holds what would let somebody in: it is going to be written to files.

    Raises:
        RequestError: credentials in an address, or an access token; the line shows ``***`` in their place.
    """
    for path, key, value in _entries(values, ""):
        for text in (key, value):
            what = exposed(text) if isinstance(text, str) else None
            if what is not None:
                shown = f"={redact(value)}" if isinstance(value, str) else ""
                raise RequestError(
                    f"{redact(path)}{shown}: holds {what}, and a config is written to files; {remedy(what)}"
                )


def refuse_unwritable(values: Any) -> None:
    """Refuse what no file can hold as UTF-8, what would end a file's name early, and endless numbers.

    Raises:
        RequestError: half of a character (a byte of the command line that is no UTF-8), a NUL, a number too long.
    """
    for path, key, value in _entries(values, ""):
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise RequestError(f"{path}: is a number of more than {MOST_BITS:,} bits; give a smaller one")
        for text in (key, value):
            if isinstance(text, str) and any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in text):
                raise RequestError(f"{path}={value!r}: holds a NUL or half a character; write it in UTF-8")


def remedy(what: str) -> str:
    """What to do about a secret in a request, by what `exposed` calls it."""
    if what == "credentials in an address":
        return (
            "leave them out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a tracking server, "
            "HF_TOKEN for the hub, in the environment"
        )
    return "leave it out; libraries read it from the environment"


def _entries(value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """``(path, key, value)`` of everything inside, lists and mappings included."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        where = f"{path}.{key}" if path else str(key)
        yield where, str(key), inner
        yield from _entries(inner, where)
