"""``compare``: runs side by side, in the terminal and as files."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlmx.comparison.curves import plain_curves
from mlmx.comparison.ranking import Table, tabulate
from mlmx.comparison.rows import settings_of
from mlmx.comparison.text import csv_text, markdown, plain, remarks, rich_table
from mlmx.config import whole
from mlmx.config.errors import RequestError, did_you_mean, path_of, require
from mlmx.config.paths import outputs_dir
from mlmx.config.schema import CompareConfig, Job
from mlmx.runs.log import log_to
from mlmx.runs.records import Result, Status, SweepRecord
from mlmx.runs.run import Run, all_runs, any_run
from mlmx.sweeps.sweep import Sweep, all_sweeps
from mlmx.tracking.read import fetch
from mlmx.tracking.store import Store, bound_store

log = logging.getLogger("mlmx")


def check(cfg: CompareConfig) -> None:
    """There are runs to compare, and a folder for every file."""
    for out in cfg.out:
        path = path_of("out", out)
        folder = path.absolute().parent
        require(folder.is_dir(), f"out={out}: there is no folder {folder}; make it first")
        require(not path.is_dir(), f"out={out}: is a folder; give a file's name")
    if cfg.tracking.get("name"):
        store_of(cfg)
        return
    for key in cfg.tracking:
        require(key == "experiment", f"tracking.{key}: goes with tracking=server or tracking=local; add one of them")
    chosen(cfg)


def compare(cfg: CompareConfig, job: Job) -> None:
    """Show the table and the curves, and write the files that were asked for."""
    with log_to(), found(cfg) as (what, those):
        table = tabulate(those, cfg.sort)
        show(table, f"{len(table.rows)} runs of {what}")
        for out in cfg.out:
            write(table, path_of("out", out), f"Runs of {what}")
            log.info("written  %s", out)


@contextlib.contextmanager
def found(cfg: CompareConfig) -> Iterator[tuple[str, list[Run]]]:
    """What is compared, in words, and its runs; those of an MLflow store lie in a folder for as long as the block."""
    if not cfg.tracking.get("name"):
        yield chosen(cfg)
        return
    store = store_of(cfg)
    local = [run for run in cfg.runs if (path_of("runs", run) / Result.FILE).is_file()]
    remote = [run for run in cfg.runs if run not in local]
    with tempfile.TemporaryDirectory(prefix="mlmx-compare-") as folder:
        those = [Run(path_of("runs", run).resolve()) for run in local]
        if remote or not cfg.runs:
            those += fetch(store, Path(folder), run_ids=remote, parent=cfg.sweep_folder)
        what = f"sweep {cfg.sweep_folder}" if cfg.sweep_folder else f"experiment {store.experiment}"
        require(bool(those), f"{store.uri}: has no run of {what}")
        yield f"{store.uri}" if cfg.runs else f"{what} in {store.uri}", those


def store_of(cfg: CompareConfig) -> Store:
    """The MLflow store that is to be read."""
    store = bound_store(cfg.tracking)
    if store is None:
        raise RequestError("tracking=none: is no store to read runs from; leave it out for the run folders here")
    return store


def chosen(cfg: CompareConfig) -> tuple[str, list[Run]]:
    """What is compared, in words, and its runs, as the local folders tell."""
    top = outputs_dir() / "train"
    if cfg.runs:
        return "those named", [any_run(wanted, "runs") for wanted in cfg.runs]
    if experiment := cfg.tracking.get("experiment"):
        return of_experiment(str(experiment))
    if cfg.sweep_folder in (None, "last"):
        sweeps = all_sweeps()
        if not sweeps:
            require(cfg.sweep_folder is None, f"sweep=last: there is no sweep below {top}; make one by train -m")
            return of_experiment()
        sweep = sweeps[-1]
    else:
        folder = path_of("sweep", str(cfg.sweep_folder))
        # The sweep.json of one may never have been written.
        is_sweep = (folder / SweepRecord.FILE).is_file() or (folder.is_dir() and bool(Sweep(folder).runs()))
        require(is_sweep, f"sweep={cfg.sweep_folder}: no sweep's folder; give one below {top}, or runs=[…]")
        sweep = Sweep(folder.resolve())
    begun = sweep.runs()
    require(bool(begun), f"{sweep.folder}: none of this sweep's jobs has begun")
    return f"the sweep in {sweep.folder}", begun


def of_experiment(name: str = "") -> tuple[str, list[Run]]:
    """The runs here of an MLflow experiment; without a name the finished ones of that of the newest finished run."""
    top, by_name = outputs_dir() / "train", dict[str, list[Run]]()
    runs = [run for run in all_runs() if name or run.status == Status.FINISHED]
    for run in runs:
        tracking = settings_of(run, []).get("tracking")
        own = str(tracking.get("experiment") or "") if isinstance(tracking, dict) else ""
        by_name.setdefault(own, []).append(run)
    if not name:
        require(bool(runs), f"no sweep and no finished run below {top}; train some first, or name them: runs=[…]")
        name, those = next((name, those) for name, those in by_name.items() if runs[-1] in those)
        return f"experiment {name}" if name else "no experiment", those
    if name not in by_name:
        known = list(filter(None, by_name))
        listed = f"{did_you_mean(name, known)} (known: {', '.join(known) or 'none'})"
        server = "for one of a server add tracking=server tracking.uri=…"
        raise RequestError(f"experiment={name}: no run below {top} is of this experiment{listed}; {server}")
    return f"experiment {name}", by_name[name]


def show(table: Table, title: str) -> None:
    """The table, what is to be said of it, and the curves; in colour where somebody looks."""
    curves = plain_curves(table)
    if not sys.stdout.isatty():
        log.info("%s\n\n%s\n%s", title, plain(table), f"\n{curves}\n" if curves else "")
        return
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    console.print(title, markup=False, style="bold")
    console.print(rich_table(table, console.width))
    for remark in remarks(table):
        console.print(remark, markup=False)
    if curves:
        console.print(f"\n{curves}\n", markup=False, no_wrap=True, crop=True)


def write(table: Table, path: Path, title: str) -> None:
    """One file, by its suffix; what was there is replaced at once, or not at all."""
    kind = path.suffix.lower()
    if kind == ".csv":
        contents = csv_text(table).encode()
    elif kind == ".md":
        contents = f"# {title}\n\n{markdown(table)}".encode()
    else:
        from mlmx.comparison import page, plots  # noqa: PLC0415 (imports matplotlib)

        with tempfile.TemporaryDirectory(prefix="mlmx-charts-") as folder:
            files = plots.plot_table(table, Path(folder))
            if kind == ".html":
                contents = page.report(table, title, files).encode()
            else:
                drawn = {file.name: file for file in files}
                chart = drawn.get(path.name.lower()) or drawn.get("curves.png")
                if chart is None:
                    raise RequestError(f"out={path}: these runs have nothing to draw; they have no losses yet")
                contents = chart.read_bytes()
    whole.write(path, contents)
