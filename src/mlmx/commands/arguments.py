"""What stands on a command line: read, checked for form, and written as Hydra takes it."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from mlmx.config.compose import quoted
from mlmx.config.errors import RequestError, path_of, require
from mlmx.config.own_files import SEARCH, searched
from mlmx.config.redaction import redact, refuse_secrets
from mlmx.config.schema import CONFIGS, group_names
from mlmx.config.trust import TRUST_FLAG, trusted_code_of

LONGEST_OVERRIDE = 10_000  # characters
MOST_LEVELS = 30  # of brackets
MOST_JOBS = 1_000  # of a sweep
GROUPS_ELSEWHERE = {"experiment": "tracking.experiment", "sweep": "sweep_folder"}  # keys of compare, groups of train


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides; as ``code`` what ``--trust-remote-code=owner/name@commit`` names, which Hydra
    never sees, as ``folders`` those of ``--config-dir`` or ``hydra.searchpath=``.

    Raises:
        RequestError: what Hydra does not know, would pass over, or would answer without naming what was given.
    """
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (TRUST_FLAG, "--out") if command == "compare" else (TRUST_FLAG,):
        ours.add_argument(flag, action="append", nargs="?", const="", default=[])
    known, others = ours.parse_known_args(arguments)
    trusted = known.trust_remote_code
    require(len(trusted) <= 1, f"{TRUST_FLAG} is given {len(trusted)} times; one repository can be trusted")
    code = trusted_code_of(command, trusted[0]) if trusted else None
    if command == "compare":
        others = _literal_files(known.out, others)
    # Hydra's own parser refuses a key=value behind a flag (model=minilm -m lr=1,2); intermixed does not.
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    parsed = parser.parse_intermixed_args(literal_texts(command, others))
    _take_out_secrets(command, parsed)
    if command == "train":  # beside it stands resume.allow
        parsed.overrides = [re.sub(r"\Aresume=", "resume.run=", override) for override in parsed.overrides]
    _require_well_formed(command, parsed)
    parsed.code, parsed.folders = code, [parsed.config_dir] if parsed.config_dir else []
    for override in [one for one in parsed.overrides if one.startswith(f"{SEARCH}=")]:
        with contextlib.suppress(Exception):  # of many kinds; composing says what is wrong
            folders = OverridesParser.create().parse_override(override).value()
            if isinstance(folders, list) and all(isinstance(folder, str) for folder in folders):
                parsed.folders = folders
                parsed.overrides.remove(override)
    return parsed


def _refuse(message: str) -> NoReturn:
    raise RequestError(message)


def _take_out_secrets(command: str, parsed: argparse.Namespace) -> None:
    """What Hydra or a launcher may write to a file holds none: a ``note`` is prose, and a secret in it is replaced."""
    for name, value in vars(parsed).items():
        if isinstance(value, str):
            refuse_secrets({f"--{name.replace('_', '-')}": value})
    for place, override in enumerate(parsed.overrides):
        key, equals, value = override.partition("=")
        if key.lstrip("+") == "note" and redact(value) != value:
            print("mlmx: note: holds a secret, which is replaced by ***", file=sys.stderr)
            parsed.overrides[place] = key + equals + redact(value)
        elif (command, key) != ("predict", "text"):  # shown again, written nowhere
            refuse_secrets({key: value})


def _require_well_formed(command: str, parsed: argparse.Namespace) -> None:
    """What Hydra would pass over or answer without naming what was given."""
    purposes = [flag for flag in ("run", "multirun", "cfg", "info", "shell_completion") if vars(parsed)[flag]]
    flags = ", ".join("--" + purpose.replace("_", "-") for purpose in purposes)
    require(len(purposes) <= 1, f"{flags}: each asks for something else; give one of them")
    require(not parsed.resolve or parsed.cfg, "--resolve: goes with --cfg job")
    if parsed.experimental_rerun is not None:  # it would unpickle a file
        _refuse(f"--experimental-rerun {parsed.experimental_rerun}: not taken here; a run's overrides.yaml repeats it")
    groups = [*group_names(CONFIGS[command]), "experiment"]
    for override in parsed.overrides:
        key, equals, value = override.partition("=")
        # Hydra's parser, whose time grows with the square of a list, is to read each within a second or two.
        if len(override) > LONGEST_OVERRIDE and (command, key) != ("predict", "text"):
            long = f"is {len(override):,} characters long and may have {LONGEST_OVERRIDE:,}"
            _refuse(f"{override[:60]}…: {long}; write it into a YAML file below --config-dir, or files as a glob")
        signs = re.sub(r"\'[^']*'|\"[^\"]*\"", "", override)
        deepest = max(itertools.accumulate(((sign in "[{(") - (sign in "]})") for sign in signs), initial=0))
        require(deepest <= MOST_LEVELS, f"{override[:60]}…: is nested {deepest} levels deep and may be {MOST_LEVELS}")
        if not override.startswith("~") and not (key and equals):
            _refuse(f"{override!r}: is no key=value (python -m mlmx {command} --help lists the keys)")
        if key in groups and value == "null":
            _refuse(f"{override}: no such option; give one that python -m mlmx {command} --help lists")
    for flag, value in (("--config-name", parsed.config_name), ("--config-path", parsed.config_path)):
        if value:
            _refuse(f"{flag} {value}: not taken here, {command} names its own config; --config-dir adds a folder to it")
    if folder := parsed.config_dir:
        if any(override.startswith(f"{SEARCH}=") for override in parsed.overrides):
            _refuse(f"--config-dir {folder}: goes not with hydra.searchpath; give the folders by one of the two")
        exists = path_of("--config-dir", folder).is_dir()
        require(exists, f"--config-dir {folder}: no such folder (looked in {Path.cwd()})")


def literal_texts(command: str, arguments: list[str]) -> list[str]:
    """``text=`` of ``predict`` is taken as it stands: a sentence is no Hydra expression.

    ``text="A [MASK]." text="B [MASK]."`` → ``text=['A [MASK].','B [MASK].']``
    """
    texts = [argument.removeprefix("text=") for argument in arguments if argument.startswith("text=")]
    if command != "predict" or not texts:
        return arguments
    others = [argument for argument in arguments if not argument.startswith("text=")]
    return [*others, f"text=[{','.join(map(quoted, texts))}]"]


def _literal_files(outs: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """``--out``, single values of ``out=`` and ``runs=``, ``experiment=`` and ``sweep=`` of ``compare``, as they stand.

    ``--out a.html out=b.csv runs=c`` → ``out=['a.html','b.csv'] runs=['c']``. Two that Hydra would take for groups:
    ``experiment=x`` → ``tracking.experiment='x'``, ``sweep=x`` → ``sweep_folder='x'``.
    """
    given = [one for one in arguments if one.partition("=")[0] in ("runs", "sweep", "experiment")]
    names = {one.partition("=")[0] for one in given}
    if len(names) > 1 and "experiment" in names:
        _refuse(f"{' and '.join(given)}: each says which runs to compare; give one of them")
    require(all(outs), "--out: needs a file, such as --out report.html")
    others: list[str] = []
    found: dict[str, list[str]] = {"out": [], "runs": []}
    for argument in [*(f"out={file}" for file in outs), *arguments]:
        key, _, value = argument.partition("=")
        is_plain = bool(value) and value[0] not in "[{'\""
        if key in found and is_plain:
            found[key].append(value)
        elif key in GROUPS_ELSEWHERE:
            others.append(f"{GROUPS_ELSEWHERE[key]}={quoted(value) if is_plain else value}")
        else:
            others.append(argument)
    return [*others, *(f"{key}=[{','.join(map(quoted, values))}]" for key, values in found.items() if values)]


def search_path(parsed: argparse.Namespace) -> list[str]:
    """The override by which Hydra finds what lies in the user's folders."""
    return [searched(parsed.folders)] if parsed.folders else []


def jobs(overrides: Sequence[Override], grid: bool) -> list[list[str]]:
    """The overrides of each job, as the sweeper asks for them; ``grid``: it is Hydra's own, which takes lists only.

    Raises:
        RequestError: more jobs than anyone means, or an interval without a search.
    """
    intervals = [o.input_line for o in overrides if o.is_sweep_override() and not o.is_discrete_sweep()]
    if intervals:
        require(not grid, f"{intervals[0]}: an interval has no list of values; a search takes it: hydra/sweeper=optuna")
        return _ends(overrides)
    number = 1
    for override in filter(Override.is_sweep_override, overrides):
        value, line = override.value(), override.input_line
        # Not listed, and in order even where they are to be shuffled: there may be millions.
        values = value.range() if isinstance(value, RangeSweep) else override.sweep_iterator()
        number *= sum(1 for _ in itertools.islice(values, MOST_JOBS + 1))
        require(number > 0, f"{line}: holds no value, so the sweep would make no run")
        if number > MOST_JOBS:
            _refuse(f"{line}: makes this a sweep of more than {MOST_JOBS:,} runs; sweep fewer values")
    return [list(job) for batch in BasicSweeper.split_arguments(list(overrides), None) for job in batch]


def _ends(overrides: Sequence[Override]) -> list[list[str]]:
    """Jobs of a search in intervals, whose values only its sweeper knows: at both ends, and every choice once."""
    tried: list[list[str]] = []
    for override in overrides:
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            tried.append([f"{key}={end}" for end in (value.start, value.end)])
        elif override.is_sweep_override():
            values = [f"{key}={one}" for one in override.sweep_string_iterator()]
            require(bool(values), f"{override.input_line}: holds no value, so the sweep would make no run")
            tried.append([values[0], values[-1]] if isinstance(value, RangeSweep) else values)
        else:
            tried.append([str(override.input_line)])
    return [[values[number % len(values)] for values in tried] for number in range(max(2, *map(len, tried)))]
