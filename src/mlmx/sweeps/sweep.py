"""A sweep on disk: its jobs, and what became of them.

::

    outputs/train/<time>/       sweep.json  mlflow.json  table.md  table.csv  report.html  plots/*.png
    outputs/train/<time>/<n>/   job.json, and the run of a job
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmx.config.paths import outputs_dir
from mlmx.runs import process
from mlmx.runs.run import Run, folders_with

SWEEP_FILE, JOB_FILE = "sweep.json", "job.json"


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    Attributes:
        key: of everything that its numbers come from, see `identity.fingerprint`; ``dials`` of its config alone.
        error: why it failed, in one line.
    """

    folder: Path
    key: str
    dials: str
    error: str | None

    @property
    def run(self) -> Run:
        return Run(self.folder)

    @property
    def failed(self) -> bool:
        return self.error is not None or self.run.status == "FAILED"


@dataclass(frozen=True)
class Sweep:
    """The folder of one sweep.

    ``sweep.json``: {"name", "command", "identity", "swept": {key: values}, "jobs": how many were asked for last,
    "status", "started" and "ended": milliseconds since 1970, "best": folder of the best run}.
    """

    folder: Path

    def about(self) -> dict[str, Any]:
        """What ``sweep.json`` says; empty where it is torn."""
        return _read(self.folder / SWEEP_FILE)

    def note(self, **facts: Any) -> None:
        """Add facts to ``sweep.json``."""
        Run(self.folder).write_json(SWEEP_FILE, self.about() | facts)

    def jobs(self) -> list[SweepJob]:
        """Its jobs that have begun, by number; of those with the same config the newest, made by newer code or data."""
        newest = {}
        for folder in self.folders():
            unnamed = {"dials": folder.name, "key": ""} if (folder / "result.json").is_file() else {}
            told = _read(folder / JOB_FILE) or unnamed
            if told:
                newest[told["dials"]] = SweepJob(folder, told["key"], told["dials"], told.get("error"))
        return sorted(newest.values(), key=lambda job: int(job.folder.name))

    def runs(self) -> list[Run]:
        """The runs of its jobs, by number; a job that failed early has none."""
        return [job.run for job in self.jobs() if (job.folder / "result.json").is_file()]

    def folders(self) -> list[Path]:
        """Those of all its jobs, by number."""
        numbered = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return sorted(numbered, key=lambda path: int(path.name))

    def free_folder(self, wanted: Path) -> Path:
        """The folder of a new job, made: the wanted one, or a number that no job asks for where it is another's."""
        if not (wanted / JOB_FILE).exists() and not (wanted / "config.yaml").exists():
            wanted.mkdir(parents=True, exist_ok=True)
            return wanted
        number = max([int(self.about().get("jobs", 0)) - 1, *(int(folder.name) for folder in self.folders())])
        while True:
            number += 1
            with contextlib.suppress(FileExistsError):
                (self.folder / str(number)).mkdir()
                return self.folder / str(number)


def begin_job(folder: Path, key: str, dials: str, overrides: Iterable[str]) -> None:
    """Write ``job.json``."""
    Run(folder).write_json(JOB_FILE, {"key": key, "dials": dials, "overrides": list(overrides), "error": None})


def fail_job(folder: Path, error: str) -> None:
    """Write into ``job.json`` why the job failed."""
    Run(folder).write_json(JOB_FILE, _read(folder / JOB_FILE) | {"error": error})


def all_sweeps() -> list[Sweep]:
    """Every sweep below outputs/train, oldest first."""
    found = [Sweep(folder) for folder in folders_with(SWEEP_FILE, outputs_dir() / "train")]
    return sorted(found, key=lambda sweep: (sweep.about().get("started", 0), str(sweep.folder)))


def mark_dead() -> list[Sweep]:
    """Write KILLED where a sweep says RUNNING and its process is no more; returns these sweeps, oldest first."""
    return [sweep for sweep in all_sweeps() if _is_dead(sweep) and _mark(sweep)]


def _is_dead(sweep: Sweep) -> bool:
    running = sweep.about().get("status") == "RUNNING"
    return running and not process.is_alive(Run(sweep.folder), running)


def _mark(sweep: Sweep) -> bool:
    with process.unless_held(sweep.folder) as is_free:
        if not is_free or sweep.about().get("status") != "RUNNING":  # gone on with, or ended, since it was looked at
            return False
        with contextlib.suppress(OSError):
            sweep.note(status="KILLED")
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
