"""From the command line to a command: help, the request, exit codes.

1. ``--help`` and mistyped commands are answered from text alone: no Hydra, no torch.
2. Every job of the request is composed and checked before anything is made, then run: `launch`.
3. Errors become one line and an exit code (0 done, 2 wrong request, 1 failed).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mlmx.config.paths import conf_dir
from mlmx.config.redaction import RedactedStream, show_traceback

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
HELP_FLAGS = ("-h", "--help")
HELP = """mlmx: masked-language-model experiments whose numbers can be compared.

usage: python -m mlmx <command> [key=value ...]

commands:
{commands}

examples:
  python -m mlmx train experiment=demo
  python -m mlmx train chunk_size=256 lr=5e-5
  python -m mlmx train -m chunk_size=128,256,512 lr=2e-5,5e-5

python -m mlmx <command> --help lists its dials and groups. MLMX_DEBUG=1 shows tracebacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what cannot be shown is no reason to end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    out, err = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return _main(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # whoever read our output has seen enough: mlmx train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in HELP_FLAGS:
        commands = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
        print(HELP.format(commands=commands))
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
        print(_command_help(command, rest))
        return 0
    return _guarded(command, rest)


def _command_help(command: str, arguments: Sequence[str]) -> str:
    """The annotated YAML of the command and the options of its groups, read as text."""
    folders = [conf_dir()]
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value or following))
    lines = (conf_dir() / f"{command}.yaml").read_text(encoding="utf-8").split("\n")
    dials = "\n".join(lines[: lines.index("hydra:")]).rstrip() if "hydra:" in lines else "\n".join(lines)
    groups = [line.split("- ")[1].split(":")[0] for line in lines if line.startswith("  - ") and ": " in line]
    rows = []
    for group in groups:
        names = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
        if names:
            rows.append(f"  {group:<11}{', '.join(names)}")
    chosen = "groups (group=option; group.key=value sets one of its options):\n" + "\n".join(rows) + "\n\n"
    return (
        f"mlmx {command}: {COMMANDS[command]}\n\n"
        f"usage: python -m mlmx {command} [key=value ...] [-m] [--cfg job] [--config-dir DIR] [--hydra-help]\n\n"
        f"{chosen if rows else ''}keys and defaults (conf/{command}.yaml):\n\n{dials}"
    )


def _guarded(command: str, arguments: list[str]) -> int:
    """Run a command; every ending is an exit code and, if it is an error, one line."""
    from mlmx.runs.signals import Interrupted, handled  # noqa: PLC0415 (imports multiprocessing)

    try:
        with handled():
            from mlmx.commands import launch  # noqa: PLC0415 (imports hydra)

            return launch.launch(command, arguments)
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
        from mlmx.runs.explain import explain  # noqa: PLC0415 (imports hydra)

        code, line = explain(error, command)
        print(f"mlmx: {line}", file=sys.stderr)
        return code


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
