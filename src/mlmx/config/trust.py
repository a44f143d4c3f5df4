"""The one hub repository whose own code may be run: named on the command line, held in this process, nowhere else.

No config, override or environment variable can set it. A job that a launcher starts in another process has none.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmx.config.errors import RequestError, require

TRUST_FLAG = "--trust-remote-code"


@dataclass(frozen=True)
class TrustedCode:
    """A hub repository at one commit."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


_trusted: ContextVar[TrustedCode | None] = ContextVar("trusted_code", default=None)
trusted_code = _trusted.get  # what the command line trusts, or None


@contextlib.contextmanager
def trusting(code: TrustedCode | None) -> Iterator[None]:
    """Inside the block, `trusted_code` is ``code``."""
    before = _trusted.set(code)
    try:
        yield
    finally:
        _trusted.reset(before)


def trusted_code_of(command: str, given: str) -> TrustedCode:
    """The value of the flag; refused if it is no repository with a full commit, or the command loads no model."""
    asked, loading = f"{TRUST_FLAG}={given}", ("train", "prepare", "evaluate", "predict")
    require(command in loading, f"{asked}: {command} loads no model; the flag is for {', '.join(loading)}")
    named = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([0-9a-f]{40})", given)
    if named is None:
        raise RequestError(f"{asked}: give a hub repository and its full commit, owner/name@<40 hexadecimal digits>")
    code = TrustedCode(named[1], named[2])
    there = f"a folder {code.repo} lies in {Path.cwd()} and would be read in its place; run elsewhere"
    require(not Path(code.repo).exists(), f"{asked}: {there}")
    return code


def require_trusted_model(model: Mapping[str, Any]) -> None:
    """Refuse a model that is not the one whose code is trusted; nothing to refuse where none is."""
    code = trusted_code()
    if code is None:
        return
    name, path, revision = (model.get(key) for key in ("name", "path", "revision"))
    other = f"the model is {path or name}; the flag is for the model that is loaded, model.path={code.repo}"
    require(name == "pretrained" and path == code.repo, f"{TRUST_FLAG}={code}: {other}")
    other = f"model.revision is {revision}; give the same commit, or model.revision=null"
    require(revision in (None, code.revision), f"{TRUST_FLAG}={code}: {other}")


def with_trusted_revision(config: dict[str, Any]) -> dict[str, Any]:
    """A command's plain values, the commit of the trusted code set as ``model.revision``: it is part of the record."""
    code = trusted_code()
    if code is None or not isinstance(config.get("model"), dict):
        return config
    require_trusted_model(config["model"])
    return config | {"model": config["model"] | {"revision": code.revision}}
