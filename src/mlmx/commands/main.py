"""From the command line to a command: help, checks before anything is made, Hydra, exit codes.

1. ``--help`` and mistyped commands are answered from text alone: no Hydra, no torch.
2. Every job of the request is composed and checked before Hydra makes its first folder.
3. Hydra runs the job(s); errors become one line and an exit code (0 done, 2 wrong request, 1 failed).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlmx.config.paths import conf_dir
from mlmx.config.redaction import RedactedStream, show_traceback

if TYPE_CHECKING:
    import argparse

    from omegaconf import DictConfig

    from mlmx.sweeps import parent

COMMANDS = {
    "train": "adapt an encoder to a text collection by masked language modelling; -m sweeps",
    "prepare": "fetch model and data ahead of time, report on the data, preview the masking",
    "evaluate": "score a finished run, or any masked-LM folder, on held-out text",
    "predict": 'fill the mask in a text: predict text="This is a great [MASK]."',
    "compare": "table and curves of runs: what differs, which is better, by how much",
    "ui": "open the MLflow UI on the runs made here, on this machine only",
    "doctor": "look after runs that ended without saying so: mark them, clear up, say how to go on",
    "sync": "send to MLflow what it did not get of a run, because it was away or the run was killed",
}
LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # the only one that runs jobs in this process
SEARCH = "hydra_plugins.mlmx_optuna.sweeper.OptunaSweeper"
HELP_FLAGS = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what cannot be shown is no reason to end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    streams = (contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)
    try:
        with contextlib.ExitStack() as shown:
            for redirect, stream in streams:
                shown.enter_context(redirect(RedactedStream(stream)))
            return _main(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # whoever read our output has seen enough: mlmx train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in HELP_FLAGS:
        print(_program_help())
        return 0
    if arguments[0] == "--version":
        print(importlib.import_module("mlmx").__version__)
        return 0
    command, *rest = arguments
    if command.startswith(("-sc", "--shell-completion")):
        return _complete(arguments)
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        shown = command if command.isprintable() and len(command) < 100 else ascii(command[:100])
        print(f"mlmx: {shown}: unknown command{hint} (commands: {', '.join(COMMANDS)})", file=sys.stderr)
        return 2
    if any(flag in HELP_FLAGS for flag in rest):
        print(_command_help(command, _config_dirs(rest)))
        return 0
    return _guarded(command, rest)


# ------------------------------------------------------------------------------------------ help


def _program_help() -> str:
    commands = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
    return (
        "mlmx: masked-language-model experiments whose numbers can be compared.\n\n"
        "usage: python -m mlmx <command> [key=value ...]\n\n"
        f"commands:\n{commands}\n\n"
        "examples:\n"
        "  python -m mlmx train experiment=demo\n"
        "  python -m mlmx train chunk_size=256 lr=5e-5\n"
        "  python -m mlmx train -m chunk_size=128,256,512 lr=2e-5,5e-5\n\n"
        "python -m mlmx <command> --help lists its dials and groups. MLMX_DEBUG=1 shows tracebacks."
    )


def _command_help(command: str, extra_dirs: list[Path]) -> str:
    """The annotated YAML of the command and the options of its groups, read as text."""
    lines = (conf_dir() / f"{command}.yaml").read_text(encoding="utf-8").split("\n")
    dials = "\n".join(lines[: lines.index("hydra:")]).rstrip() if "hydra:" in lines else "\n".join(lines)
    groups = [line.split("- ")[1].split(":")[0] for line in lines if line.startswith("  - ") and ": " in line]
    rows = []
    for group in groups:
        folders = [folder / group for folder in (conf_dir(), *extra_dirs)]
        names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        if names:
            rows.append(f"  {group:<11}{', '.join(names)}")
    chosen = "groups (group=option; group.key=value sets one of its options):\n" + "\n".join(rows) + "\n\n"
    return (
        f"mlmx {command}: {COMMANDS[command]}\n\n"
        f"usage: python -m mlmx {command} [key=value ...] [-m] [--cfg job] [--config-dir DIR] [--hydra-help]\n\n"
        f"{chosen if rows else ''}keys and defaults (conf/{command}.yaml):\n\n{dials}"
    )


def _config_dirs(arguments: Sequence[str]) -> list[Path]:
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in ("--config-dir", "-cd"):
            found.append(Path(following))
        elif argument.startswith("--config-dir="):
            found.append(Path(argument.partition("=")[2]))
    return found


# ------------------------------------------------------------------------------------- execution


def _guarded(command: str, arguments: list[str]) -> int:
    """Run a command; every ending is an exit code and, if it is an error, one line."""
    from mlmx.runs.signals import Interrupted, handled

    try:
        with handled():
            return _run(command, arguments)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else (0 if ending.code is None else 1)
    except Interrupted as ending:
        print("mlmx: " + "; ".join([str(ending), *getattr(ending, "__notes__", [])]), file=sys.stderr)
        return ending.code
    except KeyboardInterrupt:
        print("mlmx: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("MLMX_DEBUG"):
            sys.excepthook = show_traceback
            raise
        from mlmx.runs.explain import explain

        code, line = explain(error, command)
        print(f"mlmx: {line}", file=sys.stderr)
        return code


def _run(command: str, arguments: list[str]) -> int:
    from mlmx.commands.arguments import flags_first, parse, take_trusted_code
    from mlmx.config.compose import register_resolvers
    from mlmx.config.schema import register_schemas
    from mlmx.config.trust import trusting
    from mlmx.kernels.threads import Neighbours, choose_waiting

    neighbours = Neighbours()
    register_schemas()
    register_resolvers()
    code, arguments = take_trusted_code(command, arguments)
    parsed = parse(command, arguments)
    with trusting(code):
        if command == "train":
            _take_up(parsed)
        if parsed.cfg or parsed.info:
            _check_composition(command, parsed)
        elif not (parsed.hydra_help or parsed.shell_completion):
            whole = _whole(command, parsed) if parsed.multirun else None
            checked = _check_jobs(command, parsed, whole)
            together = "RANK" in os.environ or (whole is not None and _is_elsewhere(whole))
            choose_waiting(neighbours, alone=not together)
            if code is not None:
                print(f"mlmx: the code of {code} is run, with all your rights", file=sys.stderr)
            if command == "train" and whole is not None:
                return _sweep(parsed, whole, checked)
        _hand_over(command, flags_first(parsed))
    return 0


def _sweep(parsed: argparse.Namespace, whole: DictConfig, jobs: Sequence[Any]) -> int:
    """``train -m``: the jobs under their parent, in a folder that is known before Hydra makes it."""
    from mlmx.commands.arguments import flags_first
    from mlmx.config.compose import quoted
    from mlmx.runs.signals import passed_on
    from mlmx.sweeps import parent

    plan = _planned(parsed, whole, jobs)
    with parent.recorded(plan), passed_on() if _is_elsewhere(whole) else contextlib.nullcontext():
        parsed.overrides = [o for o in parsed.overrides if not o.startswith("hydra.sweep.dir=")]
        parsed.overrides.append(f"hydra.sweep.dir={quoted(str(plan.sweep.folder))}")
        _hand_over("train", flags_first(parsed))
    failed = parent.failures(plan.sweep)
    if failed:
        then = "; the same command again tries them anew" if plan.jobs else ""  # a search goes on to other values
        print(f"mlmx: {len(failed)} of {len(plan.sweep.jobs())} jobs failed{then}", file=sys.stderr)
    return 1 if failed else 0


def _is_elsewhere(whole: DictConfig) -> bool:
    """Whether a sweep's jobs run in other processes, perhaps several at once."""
    return bool(whole.hydra.launcher._target_ != LAUNCHER)


def _planned(parsed: argparse.Namespace, whole: DictConfig, jobs: Sequence[Any]) -> parent.Plan:
    from mlmx.commands import arguments
    from mlmx.config.compose import is_grid, sweep_folder
    from mlmx.sweeps import parent, search

    swept = arguments.swept(parsed, whole.hydra.sweeper.get("params"))
    if whole.hydra.sweeper._target_ == SEARCH:
        search.require_possible(whole.hydra.sweeper)
    named = any(override.startswith("hydra.sweep.dir=") for override in parsed.overrides)
    command = shlex.join(["python", "-m", "mlmx", "train", "-m", *parsed.overrides])
    fixed = arguments.fixed(parsed, swept)
    number = len(jobs) if is_grid(whole) else 0
    return parent.planned(jobs[0], command, fixed, swept, number, sweep_folder(whole), named)


def _hand_over(command: str, arguments: list[str]) -> None:
    """Hydra runs the job or jobs; errors come to us whole, and we turn them into one line."""
    import hydra

    from mlmx.config.compose import composed_once

    argv_before, sys.argv = sys.argv, ["mlmx", *arguments]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with contextlib.redirect_stderr(_WithoutJobLine(sys.stderr)), composed_once():
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)(_task)()
    finally:
        sys.argv = argv_before
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


class _WithoutJobLine:
    """stderr without Hydra's "Error executing job with overrides", which our own line follows."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text) if text.startswith("Error executing job with overrides") else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _take_up(parsed: argparse.Namespace) -> None:
    """Of ``train resume=…`` the command line that goes on with the run it means."""
    from mlmx.commands import resume

    own = None
    if resume.asked(parsed.overrides) == "auto":
        own = next(iter(_composed("train", parsed)), None)
    resume.take_up(parsed, own)


def _whole(command: str, parsed: argparse.Namespace) -> DictConfig:
    """What holds for a whole sweep, Hydra's own node included."""
    from hydra import initialize_config_dir

    from mlmx.config.compose import composed

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return composed(command, parsed.overrides, _search_path(parsed), multirun=True)


def _check_jobs(command: str, parsed: argparse.Namespace, whole: DictConfig | None) -> list[Any]:
    """Compose and check every job of the request before a folder is made or a library is loaded; their configs."""

    def check(config: Any) -> None:
        importlib.import_module(f"mlmx.commands.{command}").check(config)  # only now: a mistyped key is told without it

    return list(_composed(command, parsed, check, whole))


def _composed(
    command: str,
    parsed: argparse.Namespace,
    check: Callable[[Any], None] = lambda config: None,
    whole: DictConfig | None = None,
) -> Iterator[Any]:
    """The config of each job of the request, checked; ``whole`` is that of a sweep."""
    from hydra import initialize_config_dir
    from omegaconf import open_dict

    from mlmx.commands.arguments import jobs
    from mlmx.config.compose import composed, is_grid, require_confined, swept_params
    from mlmx.config.schema import to_config

    path = _search_path(parsed)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        params, grid = ({}, True) if whole is None else (swept_params(command, whole), is_grid(whole))
        for number, overrides in enumerate(jobs(parsed, params, grid)):
            try:
                found = composed(command, overrides, path)
                require_confined(command, found, number, multirun=parsed.multirun)
                with open_dict(found):
                    del found["hydra"]
                config = to_config(command, found)
                check(config)
            except Exception as error:
                if parsed.multirun:
                    swept = " ".join(o for o in overrides if o not in parsed.overrides)
                    error.add_note(f"job {number} of the sweep" + (f" ({swept})" if swept else ""))
                raise
            yield config


def _check_composition(command: str, parsed: argparse.Namespace) -> None:
    """Compose what is only to be shown; it may be wrong otherwise."""
    from hydra import initialize_config_dir

    from mlmx.config.compose import composed

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed(command, parsed.overrides, _search_path(parsed))


def _search_path(parsed: argparse.Namespace) -> list[str]:
    return [f"hydra.searchpath=[file://{Path(parsed.config_dir).resolve()}]"] if parsed.config_dir else []


def _task(composed: DictConfig) -> Any:
    """What Hydra runs for each job: the command of the composed config."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from mlmx.config.compose import register_resolvers, require_folder
    from mlmx.config.errors import RequestError
    from mlmx.config.schema import Job, TrainConfig, register_schemas, to_config
    from mlmx.runs.run import discard_empty

    register_schemas()  # a launcher may run this in a fresh process
    register_resolvers()
    hydra_config = HydraConfig.get()
    command = str(hydra_config.job.config_name)
    folder = Path(hydra_config.runtime.output_dir)
    require_folder(command, "hydra.runtime.output_dir", str(folder))
    job = Job(folder, tuple(hydra_config.overrides.task), dict(hydra_config.runtime.choices))
    if command == "train" and hydra_config.mode == RunMode.MULTIRUN:
        from mlmx.sweeps.job import run_job

        cfg = to_config(command, composed)
        assert isinstance(cfg, TrainConfig)
        sweep, number, stop_early = Path(hydra_config.sweep.dir), int(hydra_config.job.num), None
        if hydra_config.sweeper._target_ == SEARCH:
            from mlmx.sweeps.search import stop_early as of_trial

            sweeper = hydra_config.sweeper
            stop_early = of_trial(sweep, number, sweeper.pruner, sweeper.startup_trials)
        train = importlib.import_module("mlmx.commands.train").train
        return run_job(cfg, replace(job, sweep=sweep), number, train, stop_early)
    try:
        module = importlib.import_module(f"mlmx.commands.{command}")
        result = getattr(module, command)(to_config(command, composed), job)
        if hydra_config.mode == RunMode.MULTIRUN:
            discard_empty(folder)  # Hydra makes one for each job of a sweep
        return result
    except Exception as error:
        if isinstance(error, RequestError):
            discard_empty(folder)
        if hydra_config.mode == RunMode.MULTIRUN:
            error.add_note(f"job {hydra_config.job.num} of the sweep ({hydra_config.job.override_dirname})")
        raise


def _complete(arguments: list[str]) -> int:
    """Tab completion (``mlmx -sc install=bash``): Hydra's, with the command taken off its line."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) < 2 or words[1] not in COMMANDS:
        if any("query" in argument for argument in arguments):
            typed = words[1] if len(words) > 1 else ""
            print(" ".join(name for name in COMMANDS if name.startswith(typed)))
            return 0
        return _guarded("train", arguments)
    prefix = line.index(words[1], len(words[0])) + len(words[1])
    os.environ["COMP_LINE"] = words[0] + line[prefix:]
    return _guarded(words[1], arguments)
