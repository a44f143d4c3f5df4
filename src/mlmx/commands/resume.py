"""``train resume=…``: which run is meant, and its own command line in front of the new one.

``resume=last`` or ``resume=<folder or MLflow run id>`` repeats the command of that run; ``resume=auto`` is put behind
a command to make it go on with its own unfinished run where there is one. Either way Hydra then runs in that run's
folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os

from omegaconf import OmegaConf

from mlmx.config import own_files
from mlmx.config.compose import key_of, quoted
from mlmx.config.errors import RequestError, path_of, require
from mlmx.config.paths import outputs_dir
from mlmx.config.schema import TrainConfig
from mlmx.runs import identity, process
from mlmx.runs.records import Status
from mlmx.runs.run import Run, all_runs, run_named

KEY = "resume.run="
FOLDER = "hydra.run.dir="


def take_up(parsed: argparse.Namespace, composed: TrainConfig | None) -> None:
    """Rewrite the overrides of ``train resume=…`` in place; a command without it stays as it is.

    ``composed``: the config of the command as it stands, for ``resume=auto``; None where it cannot be composed.

    Raises:
        RequestError: no such run, one that has finished or is being trained, or a sweep.
    """
    wanted = asked(parsed.overrides)
    if wanted is None:
        return
    if parsed.multirun:
        instead = "leave out -m, or name the folder of one job of the sweep"
        raise RequestError(f"resume={wanted}: goes on with one run; {instead}")
    given = [override for override in parsed.overrides if not override.startswith(KEY)]
    if wanted == "auto":
        found, before = _own(given, composed), []
    else:
        found = unfinished(wanted, extend=any(o.startswith("resume.allow=") for o in given))
        before = _command(found, parsed, given)
    parsed.overrides = given
    if found is not None:
        kept = [override for override in given if not override.startswith(FOLDER)]
        folder = quoted(str(found.folder))
        parsed.overrides = [*before, *kept, KEY + folder, FOLDER + folder]


def asked(overrides: list[str]) -> str | None:
    """What ``resume=`` was given as, if anything."""
    values = [override.removeprefix(KEY).strip("'\"") for override in overrides if override.startswith(KEY)]
    return None if not values or values[-1] in ("", "null") else values[-1]


def _command(run: Run, parsed: argparse.Namespace, given: list[str]) -> list[str]:
    """The overrides the run was made with, but for those that are given anew."""
    path = run.folder / "overrides.yaml"
    try:
        listed = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of many kinds, from YAML's and OmegaConf's
        raise RequestError(f"{path}: cannot be read ({type(error).__name__}: {error}); the run cannot go on") from error
    require(isinstance(listed, list), f"{path}: holds no list of overrides; the run cannot go on")
    stored = [str(override) for override in listed or []]
    if (run.folder / own_files.FOLDER).is_dir():
        parsed.folders.append(str(run.folder / own_files.FOLDER))
    anew = {key_of(override) for override in given}
    return [o for o in stored if key_of(o) not in anew and not o.startswith(("hydra.", "resume."))]


def _own(given: list[str], composed: TrainConfig | None) -> Run | None:
    """The newest unfinished run of this very command; with ``hydra.run.dir=`` only the one in that folder."""
    folders = [override.removeprefix(FOLDER).strip("'\"") for override in given if override.startswith(FOLDER)]
    if folders:
        run = Run(path_of("hydra.run.dir", folders[-1]).resolve())
        return run if is_unfinished(run) else None
    wanted = None if composed is None else identity.dials(composed)
    for run in reversed(all_runs() if wanted else []):
        with contextlib.suppress(OSError, RequestError):  # damaged, or gone meanwhile
            if is_unfinished(run) and identity.dials(run.config()) == wanted:
                return run
    return None


def unfinished(wanted: str, extend: bool) -> Run:
    """The run that ``resume=`` means: its folder, its MLflow run id, or the ``last`` one that can be resumed.

    ``extend``: one that has finished is meant as well, to be trained on with changed dials.
    """
    run = run_named(wanted, "resume")
    if run is None:
        found = [run for run in all_runs() if is_unfinished(run)]
        require(bool(found), f"resume=last: no unfinished run below {outputs_dir() / 'train'}")
        return found[-1]
    require(not _is_taken(run), f"resume={wanted}: {process.holder(run)}")
    longer = f"to train it longer say so, for example: train resume={wanted} epochs=6 resume.allow=[epochs]"
    require(extend or run.status != Status.FINISHED, f"resume={wanted}: this run has finished; {longer}")
    return run


def is_unfinished(run: Run) -> bool:
    """Whether a run has ended before its time and nobody is at it."""
    return run.status not in (None, Status.FINISHED) and not _is_taken(run)


def _is_taken(run: Run) -> bool:
    """Whether another training is at a run; the first process of this very one may be, where there are several."""
    return os.environ.get("RANK", "0") == "0" and process.is_alive(run)
