"""Errors as one line: what was given, what is allowed, what to do next."""

from __future__ import annotations

import re

from mlmx.config.errors import RequestError, WorkError, did_you_mean
from mlmx.config.redaction import redact
from mlmx.config.schema import CONFIGS, group_names
from mlmx.runs.disk import disk_full, is_full

LONGEST_LINE = 1500  # characters; of a longer one the middle is left out
KINDS = {
    "Float": "a number",
    "Integer": "a whole number",
    "bool": "true or false",
    "String": "a text",
    "List": "a list",
}


def explain(error: BaseException, command: str) -> tuple[int, str]:
    """``(exit code, line)``: 2 where the request was wrong, 1 where the work failed; no secret is in the line."""
    code, line = _explain(error, command)
    return code, redact(line)


def _explain(error: BaseException, command: str) -> tuple[int, str]:
    from hydra.errors import HydraException  # noqa: PLC0415 (--help does not load Hydra)
    from omegaconf.errors import OmegaConfBaseException  # noqa: PLC0415 (nor OmegaConf)

    where = "".join(f"{note}: " for note in getattr(error, "__notes__", []))
    if isinstance(error, RequestError):
        return 2, one_line(f"{where}{error}")
    if isinstance(error, WorkError):
        return 1, one_line(f"{where}{error}")
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return 2, one_line(where + _composition(error, command))
    if is_full(error):
        return 1, one_line(f"{where}{disk_full(error)}")
    return 1, one_line(f"{where}{type(error).__name__}: {error} (MLMX_DEBUG=1 shows where)")


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

    text = str(error)
    roots = [*CONFIGS[command].__dataclass_fields__, "experiment"]
    listing = f"(python -m mlmx {command} --help lists them)"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        known = list(error.options or [])
        return f"{group}={option}: no such option{did_you_mean(option, known)} (options: {', '.join(known)})"
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return f"{error.override}: cannot be read; a value with special characters needs quotes: '{key}=\"…\"'"
    unknown = re.search(r"Could not override '([^']*)'|Could not find match|Could not delete.*?'([^']*)'", text)
    if unknown and unknown.group(1):
        key = unknown.group(1)
        return f"{key}: unknown key{did_you_mean(key, roots)} {listing}"
    merging = re.search(r"Error merging override (.*)", text)
    if merging:
        given = merging.group(1).strip()
        cause = str(error.__cause__ or "").split("\n")[0]
        key = given.lstrip("+").split("=")[0]
        groups = group_names(CONFIGS[command])
        if key in groups:
            return f"{given}: {key} is a group: {key}=<option>, or {key}.<key>=<value> {listing}"
        if cause.endswith("is not Optional"):
            return f"{given}: a value is needed"
        kind = re.search(r"(?:could not be converted to|is not a(?: valid)?) (Float|Integer|bool|String|List)", cause)
        return f"{given}: {f'{KINDS[kind.group(1)]} is needed' if kind else cause}"
    cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
    return one_line(text) + cause
