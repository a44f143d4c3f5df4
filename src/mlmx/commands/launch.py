"""The jobs of a request: each is composed once, all are checked before the first one runs.

A single run is called as it is. A sweep is Hydra's sweeper and launcher, which may run the jobs in other processes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from mlmx.commands import arguments, resume
from mlmx.config import compose, own_files
from mlmx.config.compose import ComposedOnce, folder_of, is_grid, key_of, overrides_of, require_confined
from mlmx.config.own_files import Files
from mlmx.config.paths import conf_dir
from mlmx.config.redaction import refuse_secrets
from mlmx.config.schema import Config, Job, TrainConfig, register_schemas, to_config
from mlmx.config.trust import trusting
from mlmx.kernels import threads
from mlmx.runs.run import discard_empty, keep_own
from mlmx.runs.signals import passed_on
from mlmx.sweeps import search

LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # the only one that runs jobs in this process
SEARCH = "hydra_plugins.mlmx_optuna.sweeper.OptunaSweeper"
Checked = Callable[[bool], None]  # told, when all is checked, whether the jobs run in other processes


def launch(command: str, given: Sequence[str]) -> int:
    """Do what a command line asks for, and return its exit code."""
    neighbours = threads.Neighbours()
    register_schemas()
    compose.register_resolvers()
    Plugins.instance().register(own_files.PlainFiles)
    parsed = arguments.parse(command, given)

    def is_right(elsewhere: bool = False) -> None:
        threads.choose_waiting(neighbours, alone=not (elsewhere or "RANK" in os.environ))
        if parsed.code is not None:
            print(f"mlmx: the code of {parsed.code} is run, with all your rights", file=sys.stderr)

    conf = hydra.initialize_config_dir(str(conf_dir()), version_base="1.3")
    with trusting(parsed.code), own_files.noted() as own, conf:
        if command == "train":
            is_auto = not parsed.multirun and resume.asked(parsed.overrides) == "auto"
            alone: Any = _config(command, _composed(command, parsed)) if is_auto else None
            resume.take_up(parsed, alone)
        if parsed.cfg or parsed.info or parsed.hydra_help or parsed.shell_completion:
            return show(command, parsed)
        return (sweep if parsed.multirun else run)(command, parsed, own, is_right)


def run(command: str, parsed: argparse.Namespace, own: Files, is_right: Checked) -> int:
    """One job, in this process; ``own``: YAML of the user's own that is read for it."""
    whole = _composed(command, parsed)
    require_confined(command, whole)
    config = _checked(command, whole)
    if command == "train":
        own_files.require_no_secret(own)
    is_right(False)
    getattr(_module(command), command)(config, _job(whole.hydra, folder_of(whole, "hydra.run.dir"), own))
    return 0


def _composed(command: str, parsed: argparse.Namespace) -> DictConfig:
    more = arguments.search_path(parsed)
    return compose.composed(lambda o: hydra.compose(command, [*o, *more], return_hydra_config=True), parsed.overrides)


def _checked(command: str, whole: DictConfig) -> Config:
    """The config of a job, checked as far as that goes before a folder is made or a library is loaded."""
    config = _config(command, whole)
    _module(command).check(config)  # loaded only now: a mistyped key is told without it
    return config


def _config(command: str, whole: DictConfig) -> Config:
    keys: list[Any] = [key for key in whole if key != "hydra"]
    return to_config(command, OmegaConf.masked_copy(whole, keys), own_files.folders_of(whole.hydra))


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"mlmx.commands.{command}")


def _job(node: DictConfig, folder: Path, own: Files, home: Path | None = None) -> Job:
    return Job(folder, tuple(overrides_of(node)), dict(node.runtime.choices), own, home)


def sweep(command: str, parsed: argparse.Namespace, own: Files, is_right: Checked) -> int:
    """Jobs as Hydra's sweeper asks for them, where its launcher runs them; those of ``train`` under their parent."""
    loader = ComposedOnce(GlobalHydra.instance().config_loader().get_search_path())
    load = functools.partial(loader.load_configuration, command, run_mode=RunMode.MULTIRUN, from_shell=False)
    more = [*arguments.search_path(parsed), "hydra.mode=MULTIRUN"]
    whole = compose.composed(lambda given: load(overrides=[*given, *more]), parsed.overrides)
    require_confined(command, whole, multirun=True)
    refuse_secrets(OmegaConf.to_container(whole, resolve=False))  # the sweeper writes it to multirun.yaml
    added = [f"{key}={value}" for key, value in (whole.hydra.sweeper.get("params") or {}).items()]
    asked = OverridesParser.create(loader).parse_overrides([*added, *overrides_of(whole.hydra)])
    configs: list[Any] = []
    for number, overrides in enumerate(arguments.jobs(asked, is_grid(whole))):
        with _named(number, " ".join(one for one in overrides if one not in parsed.overrides)):
            found = compose.composed(functools.partial(loader.load_sweep_config, whole), overrides)
            require_confined(command, found, number, multirun=True)
            configs.append(_checked(command, found))
    elsewhere = whole.hydra.launcher._target_ != LAUNCHER
    is_right(elsewhere)
    if command != "train":
        _launch(whole, loader)
        return 0

    from mlmx.sweeps import parent  # noqa: PLC0415 (imports matplotlib)

    own_files.require_no_secret(own)
    if whole.hydra.sweeper._target_ == SEARCH:
        search.require_possible(whole.hydra.sweeper)
    swept = {one.key_or_group: str(one.input_line).partition("=")[2] for one in asked if one.is_sweep_override()}
    fixed = [override for override in overrides_of(whole.hydra) if key_of(override) not in swept]
    number = len(configs) if is_grid(whole) else 0
    plan = parent.planned(configs[0], parsed.overrides, fixed, swept, number, folder_of(whole, "hydra.sweep.dir"), own)
    folder = plan.sweep.folder
    with parent.recorded(plan), passed_on() if elsewhere else contextlib.nullcontext():
        loader.folder = folder
        whole.hydra.sweep.dir = str(folder)
        if own:  # jobs composed in other processes are so from the sweep's copies, which nobody edits meanwhile
            keep_own(folder, own)
            others = [one for one in overrides_of(whole.hydra, "hydra") if key_of(one) != own_files.SEARCH]
            copies = own_files.searched([str(folder / own_files.FOLDER), *whole.hydra.searchpath])
            whole.hydra.overrides.hydra = [*others, copies]
        _launch(whole, loader)
    if failed := parent.failures(plan.sweep):
        then = "; the same command again tries them anew" if plan.jobs else ""  # a search goes on to other values
        print(f"mlmx: {len(failed)} of {len(plan.sweep.jobs())} jobs failed{then}", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def _named(number: int, what: str) -> Iterator[None]:
    """An error inside the block says of which job it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"job {number} of the sweep" + (f" ({what})" if what else ""))
        raise


def _launch(whole: DictConfig, loader: ComposedOnce) -> None:
    """Run the jobs; the first error that one of them returns is raised when all of them have run."""
    context = HydraContext(config_loader=loader, callbacks=Callbacks())
    sweeper = Plugins.instance().instantiate_sweeper(config=whole, hydra_context=context, task_function=job)
    returned = sweeper.sweep(arguments=overrides_of(whole.hydra))
    for one in itertools.chain.from_iterable(returned if is_grid(whole) else ()):
        if isinstance(one.return_value, Exception):
            raise one.return_value


def job(values: DictConfig) -> object:
    """A job of a sweep, as launchers call it, perhaps in a process of their own; returns what the command does.

    Of a command other than ``train`` also the error that ended it: raised, Hydra would write a line of its own.
    """
    register_schemas()
    compose.register_resolvers()
    node: Any = HydraConfig.get()
    command, number, folder = str(node.job.config_name), int(node.job.num), str(node.runtime.output_dir)
    compose.require_folder(command, "hydra.runtime.output_dir", folder)
    home, sweeper = Path(node.sweep.dir), node.sweeper
    own = own_files.kept(home)
    folders = own_files.folders_of(node)
    config = to_config(command, values, [home / own_files.FOLDER, *folders] if own else folders)
    if isinstance(config, TrainConfig):
        from mlmx.sweeps.job import run_job  # noqa: PLC0415 (imports numpy)

        is_search = sweeper._target_ == SEARCH
        stop = search.stop_early(home, number, sweeper.pruner, sweeper.startup_trials) if is_search else None
        return run_job(config, _job(node, Path(folder), own, home), number, _module("train").train, stop)
    try:
        with _named(number, node.job.override_dirname):
            made: object = getattr(_module(command), command)(config, _job(node, Path(folder), own))
            return made
    except Exception as error:  # noqa: BLE001 (of any kind: it is raised again when all jobs have run)
        return error
    finally:
        discard_empty(Path(folder))  # Hydra makes one for each job


def show(command: str, parsed: argparse.Namespace) -> int:
    """``--cfg``, ``--info``, ``--hydra-help`` and completion, which are Hydra's."""
    whole, given = GlobalHydra.instance().hydra, [*parsed.overrides, *arguments.search_path(parsed)]
    assert whole is not None
    if parsed.cfg or parsed.info:
        _composed(command, parsed)  # where Hydra breaks, by name
    program, sys.argv[0] = sys.argv[0], "mlmx"  # Hydra's word for us
    try:
        if parsed.cfg:
            whole.show_cfg(command, given, parsed.cfg, parsed.package, parsed.resolve)
        elif parsed.info:
            whole.show_info(parsed.info, command, given)
        elif parsed.hydra_help:
            whole.hydra_help(command, get_args_parser(), parsed)
        else:
            whole.shell_completion(command, parsed.overrides)
    finally:
        sys.argv[0] = program
    return 0
