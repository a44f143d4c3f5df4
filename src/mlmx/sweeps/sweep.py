"""A sweep on disk: its jobs, and what became of them.

::

    outputs/train/<time>/       sweep.json  mlflow.json  table.md  table.csv  report.html  plots/*.png
    outputs/train/<time>/<n>/   job.json, and the run of a job
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlmx.config.paths import outputs_dir
from mlmx.runs import process, records
from mlmx.runs.records import JobRecord, Result, Status, SweepRecord
from mlmx.runs.run import Run, folders_with


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep: its folder, and what is known of it."""

    folder: Path
    about: JobRecord

    @property
    def run(self) -> Run:
        return Run(self.folder)

    @property
    def failed(self) -> bool:
        return self.about.error is not None or self.run.status == Status.FAILED


@dataclass(frozen=True)
class Sweep:
    """The folder of one sweep."""

    folder: Path

    def about(self) -> SweepRecord:
        """What ``sweep.json`` says."""
        return records.read(SweepRecord, self.folder) or SweepRecord()

    def note(self, **facts: Any) -> None:  # noqa: ANN401 (those of the record)
        """Put facts into ``sweep.json``."""
        records.write(replace(self.about(), **facts), self.folder)

    def jobs(self) -> list[SweepJob]:
        """Its jobs that have begun, by number; of those with the same config the newest, made by newer code or data."""
        newest = {}
        for folder in self.folders():
            about = records.read(JobRecord, folder) or JobRecord()
            if about.dials or (folder / Result.FILE).is_file():
                newest[about.dials or folder.name] = SweepJob(folder, about)
        return sorted(newest.values(), key=lambda job: int(job.folder.name))

    def runs(self) -> list[Run]:
        """The runs of its jobs, by number; a job that failed early has none."""
        return [job.run for job in self.jobs() if (job.folder / Result.FILE).is_file()]

    def folders(self) -> list[Path]:
        """Those of all its jobs, by number."""
        numbered = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return sorted(numbered, key=lambda path: int(path.name))

    def free_folder(self, wanted: Path) -> Path:
        """The folder of a new job, made: the wanted one, or a number that no job asks for where it is another's."""
        if not (wanted / JobRecord.FILE).exists() and not (wanted / "config.yaml").exists():
            wanted.mkdir(parents=True, exist_ok=True)
            return wanted
        number = max([self.about().jobs - 1, *(int(folder.name) for folder in self.folders())])
        while True:
            number += 1
            with contextlib.suppress(FileExistsError):
                (self.folder / str(number)).mkdir()
                return self.folder / str(number)


def all_sweeps() -> list[Sweep]:
    """Every sweep below outputs/train, oldest first."""
    found = [Sweep(folder) for folder in folders_with(SweepRecord.FILE, outputs_dir() / "train")]
    return sorted(found, key=lambda sweep: (sweep.about().started, str(sweep.folder)))


def mark_dead() -> None:
    """Write KILLED where a sweep says RUNNING and its process is no more."""
    for sweep in all_sweeps():
        if sweep.about().status != Status.RUNNING or process.is_alive(Run(sweep.folder), running=True):
            continue
        with process.unless_held(sweep.folder) as is_free, contextlib.suppress(OSError):
            if is_free and sweep.about().status == Status.RUNNING:  # not gone on with, or ended, since it was looked at
                sweep.note(status=Status.KILLED)
