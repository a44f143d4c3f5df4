"""What a run and a sweep say of themselves: records, each a JSON file of its folder.

::

    result.json   how a run ended, its last numbers           process.json  which process makes it
    mlflow.json   all that makes its MLflow run               job.json      which job of a sweep it is
    sweep.json    what a sweep is, in the sweep's own folder
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_type_hints

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from mlmx.config.redaction import redacted


class Status(StrEnum):
    """How a run or a sweep stands, in its folder and in MLflow."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


def _numbers(values: Any) -> Any:
    """Of a mapping the entries that are numbers."""
    if not isinstance(values, Mapping):
        return values
    return {str(key): value for key, value in values.items() if type(value) in (int, float)}


Numbers = Annotated[dict[str, float], BeforeValidator(_numbers)]


@dataclass
class Result:
    """How a run ended; where that was not written, as by a power cut, it says RUNNING.

    Attributes:
        resumable: whether a run that ended early can go on.
        pruned: it was ended early, as no better than others were by then.
        metrics: the last value of each; ``seconds``: what was spent on each part.
    """

    FILE: ClassVar = "result.json"
    status: Status = Status.RUNNING
    resumable: bool = False
    run_id: str | None = None
    run_name: str | None = None
    command: str | None = None
    protocol: str | None = None
    pruned: bool = False
    metrics: Numbers = field(default_factory=dict)
    seconds: Numbers = field(default_factory=dict)


@dataclass
class MlflowRecord:
    """All that makes the MLflow run of a run or a sweep.

    Attributes:
        started, ended: milliseconds since 1970.
        run_id: once MLflow has said it.
        register: by what name its best and last models go into the registry when it has finished.
        kept: the checkpoints that are there, where older ones are deleted as new ones come.
        notes: earlier descriptions of ours, by which one that a person has edited can be told.
    """

    FILE: ClassVar = "mlflow.json"
    name: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    started: int = 0
    ended: int | None = None
    run_id: str | None = None
    register: str | None = None
    kept: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class ProcessRecord:
    """Which process makes a run, so that nobody takes another one for it; None where the system does not tell."""

    FILE: ClassVar = "process.json"
    host: str | None = None
    boot_id: str | None = None
    pid_namespace: str | None = None
    pid: int | None = None
    pid_started: float | None = None
    started: str | None = None


@dataclass
class JobRecord:
    """A job of a sweep.

    Attributes:
        key: of everything that its numbers come from, see `identity.fingerprint`; ``dials`` of its config alone.
        error: why it failed, in one line.
    """

    FILE: ClassVar = "job.json"
    key: str = ""
    dials: str = ""
    overrides: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass
class SweepRecord:
    """A sweep.

    Attributes:
        identity: by which the same sweep, issued again, is known.
        swept: what stands behind each swept key.
        jobs: how many were asked for last.
        started, ended: milliseconds since 1970.
        best: folder of the best run.
    """

    FILE: ClassVar = "sweep.json"
    name: str = ""
    command: str = ""
    identity: str = ""
    swept: dict[str, str] = field(default_factory=dict)
    jobs: int = 0
    status: Status = Status.RUNNING
    started: int = 0
    ended: int | None = None
    best: str | None = None


class Record(Protocol):
    """A dataclass that knows its file."""

    FILE: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)


def read(kind: type[R], folder: Path) -> R | None:
    """A record of a folder; None where it has none. What a file holds is never a reason to fail.

    What is of another type than it should be counts as absent; of a file that is torn, all of it does.
    """
    try:
        found = json.loads((folder / kind.FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError):
        found = {}
    usable = {}
    for name, adapter in _adapters(kind).items():
        if isinstance(found, dict) and name in found:
            with contextlib.suppress(ValidationError):
                usable[name] = adapter.validate_python(found[name])
    return kind(**usable)


def as_json(record: Record) -> str:
    """The file's text: numbers stay what they are, secrets do not."""
    return json.dumps(redacted(asdict(record)), indent=2, ensure_ascii=False) + "\n"


@cache
def _adapters(kind: type[Record]) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return {one.name: TypeAdapter(hints[one.name]) for one in fields(kind)}
