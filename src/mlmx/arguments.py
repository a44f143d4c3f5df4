"""What stands on a command line: read, checked for form, and written as Hydra takes it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from mlmx.config import CONFIGS, RequestError, group_names


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags, and the overrides.

    Raises:
        RequestError: what Hydra does not know, would pass over, or would answer without naming what was given.
    """
    # Hydra's own parser refuses a key=value behind a flag (model=minilm -m lr=1,2); intermixed does not.
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    parsed = parser.parse_intermixed_args(literal_texts(command, list(arguments)))
    if command == "train":
        parsed.overrides = [_resume_key(override) for override in parsed.overrides]
    _require_well_formed(command, parsed)
    return parsed


def _require_well_formed(command: str, parsed: argparse.Namespace) -> None:
    """What Hydra would pass over or answer without naming what was given."""
    groups = [*group_names(CONFIGS[command]), "experiment"]
    for override in parsed.overrides:
        key, equals, value = override.partition("=")
        if not override.startswith("~") and not (key and equals):
            _refuse(f"{override!r}: is no key=value (python -m mlmx {command} --help lists the keys)")
        if key in groups and value == "null":
            _refuse(f"{override}: no such option; give one that python -m mlmx {command} --help lists")
    for flag, value in (("--config-name", parsed.config_name), ("--config-path", parsed.config_path)):
        if value:
            _refuse(f"{flag} {value}: not taken here, {command} names its own config; --config-dir adds a folder to it")
    if parsed.config_dir and not Path(parsed.config_dir).is_dir():
        _refuse(f"--config-dir {parsed.config_dir}: no such folder (looked in {Path.cwd()})")


def _refuse(message: str) -> NoReturn:
    raise RequestError(message)


def _resume_key(override: str) -> str:
    """``resume=last`` → ``resume.run=last``: beside it stands ``resume.allow``."""
    return f"resume.run={override.removeprefix('resume=')}" if override.startswith("resume=") else override


def literal_texts(command: str, arguments: list[str]) -> list[str]:
    """``text=`` of ``predict`` is taken as it stands: a sentence is no Hydra expression.

    ``text="A [MASK]." text="B [MASK]."`` → ``text=['A [MASK].','B [MASK].']``
    """
    if command != "predict":
        return arguments
    texts = [argument.removeprefix("text=") for argument in arguments if argument.startswith("text=")]
    others = [argument for argument in arguments if not argument.startswith("text=")]
    if not texts:
        return others
    return [*others, f"text=[{','.join(map(quoted, texts))}]"]


def quoted(text: str) -> str:
    """A text as Hydra takes it literally, in single quotes."""
    return "'" + _escaped(text) + "'"


def _escaped(text: str) -> str:
    """Inside Hydra's single quotes: quotes, ``${`` and the backslashes before either are escaped."""
    return re.sub(r"(\\*)('|\$\{)", r"\1\1\\\2", re.sub(r"(\\+)\Z", r"\1\1", text))


def flags_first(parsed: argparse.Namespace) -> list[str]:
    """The command line that Hydra's own parser takes: flags, then overrides."""
    flags: list[str] = []
    for name, value in vars(parsed).items():
        flag = "--" + name.replace("_", "-")
        if name == "overrides" or value in (None, False):
            continue
        if name == "shell_completion":
            flag = "--shell-completion"
        flags += [flag] if value is True else [flag, str(value)]
    return [*flags, *parsed.overrides]


def jobs(parsed: argparse.Namespace) -> list[list[str]]:
    """The overrides of each job: one list without ``-m``, the basic sweeper's grid with it."""
    overrides: list[str] = [o for o in parsed.overrides if not o.startswith(("hydra.", "hydra/"))]
    if not parsed.multirun:
        return [overrides]
    parsed_overrides = OverridesParser.create().parse_overrides(overrides)
    if any(o.is_sweep_override() and not o.is_discrete_sweep() for o in parsed_overrides):
        return []  # a continuous interval: its values are known to its sweeper only
    return [list(job) for batch in BasicSweeper.split_arguments(parsed_overrides, None) for job in batch]
