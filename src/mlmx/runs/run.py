"""A run on disk: where it lies, what its files are called, how to find it again.

::

    outputs/train/<time>/   config.yaml overrides.yaml train.log metrics.jsonl result.json data.json mlflow.json
                            plots/*.png  model/  checkpoints/  conf/ (YAML of the user's own)
    outputs/mlflow.db  outputs/mlartifacts/
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mlmx.config import own_files, whole
from mlmx.config.errors import RequestError, path_of
from mlmx.config.paths import outputs_dir
from mlmx.config.redaction import redacted
from mlmx.config.schema import Resume, TrainConfig, from_plain
from mlmx.runs import records
from mlmx.runs.checkpoints import MANIFEST, all_of, is_interim
from mlmx.runs.metrics_file import MetricsFile, rows_of
from mlmx.runs.records import Result, Status, as_json

EXAMPLES_FILE = "examples.json"  # a table of what a run puts into the same held-out sentences after each epoch
HELDOUT_FILE = "heldout.npz"  # per-document sums of the last scoring, by which pairs of runs are compared


def discard_empty(folder: Path) -> None:
    """Remove a run folder that nothing was written to, and the empty folders above it, outputs/ included."""
    outputs = outputs_dir()
    while outputs in (folder, *folder.parents):
        if folder.is_dir():
            contents = list(folder.iterdir())
            if [path.name for path in contents] == ["multirun.yaml"]:  # Hydra's note of a sweep of which no job started
                contents.pop().unlink()
            if contents:
                return
            folder.rmdir()
        folder = folder.parent


@dataclass(frozen=True)
class Run:
    """The folder of one training."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.folder / "plots"

    @property
    def status(self) -> Status | None:
        """As far as the folder knows; None where no run has begun."""
        found = records.read(Result, self.folder)
        return None if found is None else found.status

    def result(self) -> Result:
        """What ``result.json`` says."""
        return records.read(Result, self.folder) or Result()

    def saved(self) -> list[Path]:
        """The whole checkpoints that were asked for (not those saved on the way), by step; their files are not read."""
        found = reversed(all_of(self.checkpoints))
        return [folder for folder in found if (folder / MANIFEST).is_file() and not is_interim(folder)]

    def write_json(self, name: str, value: object) -> None:
        """As `write_text`. Numbers stay what they are, secrets do not."""
        self.write_text(name, as_json(value))

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run, whole or not at all."""
        whole.write(self.folder / name, text)

    def append_metrics(self, step: int, epoch: float, metrics: Mapping[str, float]) -> dict[str, Any]:
        """One line of ``metrics.jsonl``, of a run that has ended; returns its row."""
        with contextlib.closing(MetricsFile(self.folder)) as file:
            return file.append(step, epoch, metrics)

    def append_line(self, name: str, row: Mapping[str, Any]) -> None:
        """One JSON object as a line of a file of the run."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(redacted(row)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, oldest first."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        with path.open("rb") as file:
            return rows_of(file)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object among the files of the run, empty where it has none yet; a ValueError where it is torn."""
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except RecursionError as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}: holds no JSON object")
        return value

    def config(self) -> TrainConfig:
        """The resolved config the run was made with."""
        path = self.folder / "config.yaml"
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(loaded, dict)
        except Exception as error:  # of many kinds, from YAML's and OmegaConf's
            said = f"{path}: cannot be read ({type(error).__name__}: {error}); choose another run"
            raise RequestError(said) from error
        return from_plain(TrainConfig, {str(key): value for key, value in loaded.items()})


def begin_run(
    folder: Path,
    cfg: TrainConfig,
    overrides: tuple[str, ...],
    inputs: Mapping[str, Any],
    own: own_files.Files | None = None,
    drift: Mapping[str, tuple[Any, Any]] | None = None,
) -> Run:
    """Write the first files of a run; refuse a folder that already holds one, unless that is what goes on.

    ``inputs``: what it is made of beyond its config, see `identity`; ``own``: YAML of the user's own, which the config
    was composed with; ``drift``: of a run that goes on what has changed about it (``drift.jsonl``), None for a new one.
    """
    if drift is None and (folder / "config.yaml").exists():
        choices = f"choose another hydra.run.dir, or go on with it by resume={folder}"
        raise RequestError(f"{folder}: already holds a run; {choices}")
    folder.mkdir(parents=True, exist_ok=True)
    run, plain = Run(folder), redacted(asdict(replace(cfg, resume=Resume())))
    if drift:
        changes = {key: {"was": was, "is": now} for key, (was, now) in drift.items()}
        run.append_line("drift.jsonl", {"time": records.moment(), "changes": changes})
    try:
        keep_own(folder, own or {})
        searched = [own_files.searched([str(folder / own_files.FOLDER)])] if own else []
        run.write_text("overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(redacted([*searched, *overrides]))))
        run.write_json("inputs.json", inputs)
        records.write(replace(run.result(), status=Status.RUNNING), folder)
        run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    except OSError:  # a full disk
        if drift is None:
            for name in ("overrides.yaml", "inputs.json", Result.FILE, "config.yaml"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / own_files.FOLDER, ignore_errors=True)
        raise
    return run


def keep_own(folder: Path, own: own_files.Files) -> None:
    """Write YAML of the user's own below ``conf/`` of a run or a sweep."""
    for place, text in own.items():
        path = folder / own_files.FOLDER / place
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write(path, text)


def find_run(wanted: str) -> Run:
    """The finished run a user means: its folder, its MLflow run id, or ``last``; refuses any other."""
    if run := run_named(wanted):
        if run.status != Status.FINISHED or not (run.model / "config.json").is_file():
            raise RequestError(f"run={wanted}: this run is unfinished (status {run.status}); choose one that finished")
        return run
    for run in reversed(all_runs()):
        if run.status == Status.FINISHED:
            return run
    raise RequestError(f"run=last: no finished run below {outputs_dir() / 'train'}; train one first")


def run_named(wanted: str, key: str = "run") -> Run | None:
    """The run of this folder or MLflow run id, in whatever state; None for ``last``; refuses where there is none."""
    if wanted == "last":
        return None
    folder = path_of(key, wanted)
    if (folder / Result.FILE).is_file():
        return Run(folder.resolve())
    for run in all_runs():
        if wanted and run.result().run_id == wanted:
            return run
    where = f"a run folder (below {outputs_dir() / 'train'}), an MLflow run id, or last"
    raise RequestError(f"{key}={wanted}: no such run; give {where}")


def any_run(wanted: str, key: str = "run") -> Run:
    """As `run_named`; ``last`` is the newest one."""
    run = run_named(wanted, key) or next(reversed(all_runs()), None)
    if run is None:
        raise RequestError(f"{key}=last: no run below {outputs_dir() / 'train'}; train one first")
    return run


def all_runs() -> list[Run]:
    """Every run below outputs/train, oldest first."""

    def started(run: Run) -> float:
        path = run.folder / "overrides.yaml"  # written once, at the start
        return path.stat().st_mtime if path.is_file() else -math.inf

    return sorted((Run(folder) for folder in folders_with(Result.FILE, outputs_dir() / "train")), key=started)


def folders_with(name: str, top: Path) -> Iterator[Path]:
    """Folders that hold a file of that name; not looked for inside them: thousands of runs have many files each."""
    for folder, subfolders, names in os.walk(top):
        if name in names:
            subfolders.clear()
            yield Path(folder)
