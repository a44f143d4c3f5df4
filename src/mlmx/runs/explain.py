"""Errors as one line: what was given, what is allowed, what to do next."""

from __future__ import annotations

import re

from mlmx.config.errors import RequestError, WorkError, did_you_mean
from mlmx.config.redaction import redact
from mlmx.config.schema import CONFIGS, group_names
from mlmx.runs.disk import disk_full, is_full

LONGEST_LINE = 1500  # characters; of a longer one the middle is left out
KIND = {"Float": "a number", "Integer": "a whole number", "String": "a text", "bool": "true or false", "List": "a list"}


def explain(error: BaseException, command: str) -> tuple[int, str]:
    """``(exit code, line)``: 2 where the request was wrong, 1 where the work failed; no secret is in the line."""
    from hydra.errors import HydraException  # noqa: PLC0415 (--help does not load Hydra)
    from omegaconf.errors import OmegaConfBaseException  # noqa: PLC0415 (nor OmegaConf)

    code, line = 1, f"{type(error).__name__}: {error} (MLMX_DEBUG=1 shows where)"
    if isinstance(error, (RequestError, WorkError)):
        code, line = 2 if isinstance(error, RequestError) else 1, str(error)
    elif isinstance(error, (HydraException, OmegaConfBaseException)):
        code, line = 2, _composition(error, command)
    elif is_full(error):
        line = str(disk_full(error))
    notes = "".join(f"{note}: " for note in getattr(error, "__notes__", []))
    return code, redact(one_line(f"{notes}{line}"))


def one_line(error: BaseException | str) -> str:
    """A message without line breaks and without what a terminal would act on: these stand as `repr` writes them.

    >>> one_line("no such file:\\n  a.txt")
    'no such file: a.txt'
    >>> one_line("note=\\x1b[31m")
    'note=\\\\x1b[31m'
    """
    text = " ".join(str(error).split())
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} … {text[-LONGEST_LINE // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _composition(error: BaseException, command: str) -> str:
    """Hydra's composition errors in our words."""
    from hydra.errors import MissingConfigException, OverrideParseException  # noqa: PLC0415 (as above)

    text, listing = str(error), f"(python -m mlmx {command} --help lists them)"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        known = list(error.options or [])
        return f"{group}={option}: no such option{did_you_mean(option, known)} (options: {', '.join(known)})"
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return f"{error.override}: cannot be read; a value with special characters needs quotes: '{key}=\"…\"'"
    if unknown := re.search(r"Could not override '([^']+)'", text):
        key = unknown.group(1)
        roots = [*CONFIGS[command].__dataclass_fields__, "experiment"]
        return f"{key}: unknown key{did_you_mean(key, roots)} {listing}"
    if merging := re.search(r"Error merging override (.*)", text):
        given, cause = merging.group(1).strip(), str(error.__cause__ or "").split("\n")[0]
        key = given.lstrip("+").split("=")[0]
        if key in group_names(CONFIGS[command]):
            return f"{given}: {key} is a group: {key}=<option>, or {key}.<key>=<value> {listing}"
        if cause.endswith("is not Optional"):
            return f"{given}: a value is needed"
        kind = re.search(r"(?:could not be converted to|is not a(?: valid)?) (Float|Integer|bool|String|List)", cause)
        return f"{given}: {f'{KIND[kind.group(1)]} is needed' if kind else cause}"
    cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
    return one_line(text) + cause
