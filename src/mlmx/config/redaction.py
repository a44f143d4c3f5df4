"""Secrets out of text: what would let somebody in is replaced by ``***`` wherever mlmx shows or writes text.

Secrets are the values of environment variables whose names say so (``HF_TOKEN``, ``MLFLOW_TRACKING_PASSWORD``,
``AWS_SECRET_ACCESS_KEY`` and the like), the credentials in an address, and tokens known by their form. Imports nothing
heavy: every line that is shown passes through here.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

from mlmx.config.errors import RequestError
from mlmx.config.trust import TRUST_FLAG

STARS = "***"
# The environment's names, looked through at every line; os.environ would decode each of them again every time.
NAMES: Mapping[Any, Any] = os.environb if os.supports_bytes_environ else os.environ

SECRET = re.compile(r"(?i)(token|passw(or)?d|secret|(secret|api|access|private)_?key|access_?key_?id|credentials)$")
# Every pattern begins with a literal and is bounded, so that a line of megabytes takes no longer than its length asks.
# Credentials in an address, up to its host: a password may hold a slash or an @ of its own, a token may stand alone.
USERINFO = re.compile(
    r"(://)(?!\*\*\*@)(?:[^\s/?#@:'\"\[]{1,256}:(?!\d{1,5}\b(?!@))[^\s'\"]{0,1024}@|[^\s/?#'\"]{1,1024}@)"
)
PARAMETER = re.compile(
    r"(?i)([?&](?:[\w.%-]{0,64}?(?:token|secret|passw(?:or)?d|signature|credential|api[-_]?key|access[-_]?key(?:id)?)"
    r"|sig|key)=)(?!\*\*\*)[^&;#\s'\"]+"
)
HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer)\s+)(?!\*\*\*)[^\s'\"]+", re.IGNORECASE)
KNOWN_FORM = re.compile(r"()(?:\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b)")


def redact(text: str) -> str:
    """The text with ``***`` in place of every secret.

    >>> redact("cannot reach http://ann:s3cret@host:5000/api")
    'cannot reach http://***@host:5000/api'
    """
    values = tuple(value for _, value in _secrets())
    if values:
        text = _any_of(values).sub(STARS, text)
    if "://" in text:
        text = USERINFO.sub(rf"\1{STARS}@", text)
    if "?" in text or "&" in text:
        text = PARAMETER.sub(rf"\1{STARS}", text)
    for pattern in (HEADER, KNOWN_FORM):
        text = pattern.sub(rf"\1{STARS}", text)
    return text


def redacted(value: Any) -> Any:  # noqa: ANN401 (of a type's values, values of that type)
    """The same value with every text in it redacted, keys included; lists and mappings are copied."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(inner) for inner in value]
    return value


def exposed(text: str) -> str | None:
    """What secret a text holds, in words, or None.

    >>> exposed("http://ann:s3cret@host"), exposed("http://host:5000")
    ('credentials in an address', None)
    """
    if redact(text) == text:
        return None
    if USERINFO.search(text) or PARAMETER.search(text):
        return "credentials in an address"
    for name, value in _secrets():
        if any(form in text for form in _forms(value)):
            return f"the value of {name}"
    return "an access token"


def _secrets() -> Iterator[tuple[str, str]]:
    """Names and values of the environment variables that hold secrets."""
    for name in filter(_is_secret, NAMES):
        value = os.environ.get(os.fsdecode(name), "").strip()
        if len(value) >= 8:  # a shorter one would be found by chance in ordinary text
            yield os.fsdecode(name), value


@lru_cache(maxsize=1024)
def _is_secret(name: str | bytes) -> bool:
    return SECRET.search(os.fsdecode(name)) is not None


@lru_cache(maxsize=256)
def _forms(value: str) -> tuple[str, ...]:
    """A secret as it may stand in text: itself, in an address, in JSON, in an exception, on one line."""
    inside = json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value)
    return value, quote(value, safe=""), quote_plus(value), *(form[1:-1] for form in inside), " ".join(value.split())


@lru_cache(maxsize=8)
def _any_of(values: tuple[str, ...]) -> re.Pattern[str]:
    forms = {form for value in values for form in _forms(value)}
    # The longest first: one secret may begin another.
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))))


class RedactedStream:
    """A text stream that shows no secret; else it is the stream it stands for."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.stream.writelines(map(redact, lines))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the stream has)
        return getattr(self.stream, name)


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A ``sys.excepthook`` whose traceback holds no secret."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def refuse_code(values: object) -> None:
    """Refuse a plain, resolved config that could run code: names are looked up in tables, never imported."""
    for path, key, _ in entries(values):
        if key == "_target_":
            own = "your own functions come in through the entry point group mlmx.plugins"
            raise RequestError(f"{redact(path)}: a config names functions by 'name:', _target_ is not accepted; {own}")
        if "trust_remote_code" in key:
            instead = f"name the repository on the command line: {TRUST_FLAG}=owner/name@<40 hexadecimal digits>"
            raise RequestError(f"{redact(path)}: cannot be switched on by a config; {instead}")


def refuse_secrets(values: object) -> None:
    """Refuse a plain config that holds what would let somebody in: it is going to be written to files."""
    for path, key, value in entries(values):
        for text in (key, value):
            what = exposed(text) if isinstance(text, str) else None
            if what is not None:
                shown = redact(path) + (f"={redact(value)}" if isinstance(value, str) else "")
                raise RequestError(f"{shown}: holds {what}, and a config is written to files; {remedy(what)}")


def refuse_unwritable(values: object) -> None:
    """Refuse what no file can hold as UTF-8, what would end a file's name early, and endless numbers."""
    for path, key, value in entries(values):
        if isinstance(value, int) and value.bit_length() > 4096:
            raise RequestError(f"{path}: is a number of more than 4,096 bits; give a smaller one")
        for text in (key, value):
            if isinstance(text, str) and any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in text):
                raise RequestError(f"{path}={value!r}: holds a NUL or half a character; write it in UTF-8")


def remedy(what: str) -> str:
    """What to do about a secret in a request, by what `exposed` calls it."""
    if what != "credentials in an address":
        return "leave it out; libraries read it from the environment"
    server = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a tracking server"
    return f"leave them out and set {server}, HF_TOKEN for the hub, in the environment"


def entries(value: object, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """``(path, key, value)`` of everything inside, lists and mappings included."""
    listed = enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in value.items() if isinstance(value, Mapping) else listed:
        where = f"{path}.{key}" if path else str(key)
        yield where, str(key), inner
        yield from entries(inner, where)
