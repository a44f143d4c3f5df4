"""What the folder of a run tells, whatever state it is in; what cannot be read is left out and said."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from mlmx.config.own_files import yaml_loader
from mlmx.evaluation.bootstrap import DocumentSums
from mlmx.runs import identity, process, records
from mlmx.runs.metrics_file import rows_of
from mlmx.runs.records import MlflowRecord, Result, SplitRecord, Status, numbers
from mlmx.runs.run import HELDOUT_FILE, Run

CURVES = ("heldout/loss", "eval/loss")  # what is drawn over epochs
MOST_CONFIG_BYTES = 100_000
MOST_HELDOUT_BYTES = 100_000_000
LAST_LINES = 20  # of metrics.jsonl, which are read whole

Points = list[tuple[float, float]]  # (epoch, value)


@dataclass(frozen=True)
class Row:
    """A run as it stands in a table."""

    run: Run
    run_id: str | None
    name: str  # what it is called in the table, no two alike
    title: str  # the name it was given, or that of its dials
    varies: dict[str, Any]  # values of the table's keys; a key that is not in its config is missing
    dials: dict[str, Any]  # all of its config that makes it what it is, flat
    choices: dict[str, str]  # the options of its groups (``{"model": "minilm"}``), where known
    metrics: dict[str, float]  # the last value of each, and ``minutes``; may hold NaN
    interval: tuple[float, float] | None  # 95 % of its ``heldout/loss`` over documents
    protocol: str | None  # what ``heldout/*`` was measured on; None where nothing was
    parts: dict[str, Any]  # what its protocol is made of, as far as it was recorded
    validation: dict[str, Any]  # what ``eval/*`` was measured on
    status: Status
    resumable: bool  # it ended early and can go on
    pruned: bool  # its search ended it early, as no better than other trials
    note: str  # what could not be read, or why it failed
    curves: dict[str, Points]  # for each of `CURVES` its points over epochs, step 0 included

    def value(self, metric: str) -> float:
        """A metric's last value; NaN where there is none."""
        return self.metrics.get(metric, math.nan)


def rows_for(runs: Sequence[Run], failures: Mapping[Path, str]) -> list[Row]:
    """A row per run, each folder once, and one per failed job (why, by its folder) that never had a run.

    A row is called by the name its run was given, where it is its own; else by the end of its folder's path, as long
    as it takes.
    """
    folders = list(dict.fromkeys([*(run.folder for run in runs), *failures]))
    rows = [_read(Run(folder), failures.get(folder, "")) for folder in folders]
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    ends = ["/".join(folder.parts[-length:]) for folder in folders]
    given = Counter([row.name for row in rows] + ends)
    own = [row.name if row.name and given[row.name] == 1 else shown(end) for row, end in zip(rows, ends, strict=True)]
    return [replace(row, name=name) for row, name in zip(rows, own, strict=True)]


def _read(run: Run, failure: str) -> Row:
    notes = [failure] if failure else []
    found = records.read(Result, run.folder, notes)
    result, splits = found or Result(), records.read_splits(run.folder, notes)
    inputs: dict[str, Any] = {}
    try:
        inputs = run.read_json("inputs.json")
    except (OSError, ValueError):
        notes.append("inputs.json cannot be read")
    config, dials = settings_of(run, notes), dict[str, Any]()
    try:
        dials = identity.recorded_dials(config)
        resolved = ("precision", "processes")  # inputs that say more than the config does
        dials |= {key: inputs[key] for key in resolved if dials and key in inputs}
    except (ValueError, RecursionError):  # an anchor that holds itself, or many times many
        notes.append("config.yaml cannot be read")
    # The curves, and the last value of each metric as far as the last lines and those of scorings tell.
    curves: dict[str, Points] = {name: [] for name in CURVES}
    last: dict[str, float] = {}
    try:
        for line in _telling_rows(run.folder / "metrics.jsonl"):
            values = numbers(line)
            last |= {name: value for name, value in values.items() if "/" in name}
            for name in CURVES:
                if name in values and "epoch" in values:
                    curves[name].append((values["epoch"], values[name]))
    except OSError:
        notes.append("metrics.jsonl cannot be read")
    if found is None:
        status = Status.FAILED if failure else Status.UNKNOWN
    elif result.status == Status.RUNNING and not process.is_alive(run):
        status = Status.KILLED  # what a process that is gone could not say
    else:
        status = result.status
    seconds, heldout = result.seconds.get("total"), splits.get("heldout", SplitRecord())
    parts = {**heldout.protocol_parts, "source": heldout.source, "number": heldout.documents}
    # What eval/* asks: the chunks, and the masks on them.
    chunks = splits.get("eval", SplitRecord()).sha256
    masks = {key: value for key, value in dials.items() if key in ("mlm_probability", "seed") or "masking." in key}
    return Row(
        run=run,
        name=shown(str(config.get("run_name") or "")),
        title=shown(result.run_name or ""),
        varies={},
        metrics=last | result.metrics | ({} if seconds is None else {"minutes": seconds / 60}),
        interval=None,
        status=status,
        protocol=None if result.protocol in (None, "", "none") else shown(result.protocol),
        resumable=result.resumable or (status == Status.KILLED and result.status == Status.RUNNING),
        pruned=result.pruned,
        dials=dials,
        choices=(records.read(MlflowRecord, run.folder) or MlflowRecord()).params,  # as MLflow gets them
        parts={key: value for key, value in parts.items() if value not in (None, "", 0)},
        validation={"chunks": chunks, **masks} if chunks else {},
        note=shown("; ".join(notes)),
        run_id=result.run_id,
        # A resumed run repeats what it lost: the last word on an epoch counts.
        curves={name: sorted(dict(points).items()) for name, points in curves.items() if points},
    )


def settings_of(run: Run, notes: list[str]) -> dict[str, Any]:
    """The config as it was written, whatever its keys; empty where it is unreadable, which is noted."""
    path = run.folder / "config.yaml"
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise ValueError("too large")
        found = yaml_loader()(path.read_text(encoding="utf-8")).get_single_data()
        if not isinstance(found, dict):
            raise ValueError("no mapping")
        return {str(key): value for key, value in found.items()}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        notes.append("config.yaml cannot be read")
        return {}


def _telling_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows that hold scores, and the last ones; the many lines between are not parsed."""
    if not path.is_file():
        return
    lines: deque[bytes] = deque(maxlen=LAST_LINES)
    with path.open("rb") as file:
        for line in file:
            if len(lines) == LAST_LINES and (b'"eval/' in lines[0] or b'"heldout/' in lines[0]):
                yield from rows_of([lines[0]])
            lines.append(line)
    yield from rows_of(lines)


def documents_of(row: Row) -> DocumentSums | None:
    """The sums per held-out document behind a run's ``heldout/loss``; None where there are none, or of another time."""
    path = row.run.folder / HELDOUT_FILE
    try:
        if path.stat().st_size > MOST_HELDOUT_BYTES:
            return None
        found = DocumentSums.load(path)
        mean = found.sums().totals["loss"] / found.sums().tokens
    except Exception:  # noqa: BLE001 (of many kinds, from zip's and numpy's)
        return None
    return found if math.isclose(mean, row.value("heldout/loss"), rel_tol=1e-6) else None


def shown(text: str) -> str:
    """A text of a file as one line without what a terminal would act on."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in " ".join(text.split()))
