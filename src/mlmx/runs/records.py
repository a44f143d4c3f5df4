"""What a run and a sweep say of themselves: records, each a JSON file of its folder."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_type_hints

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError

from mlmx.config import whole
from mlmx.config.redaction import redacted


class Status(StrEnum):
    """How a run or a sweep stands, in its folder and in MLflow; UNKNOWN where a file says none of the four."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"
    UNKNOWN = "UNKNOWN"

    @classmethod
    def _missing_(cls, value: object) -> Status:
        return cls.UNKNOWN

    @property
    def is_end(self) -> bool:
        """Whether it is one of the three that a run ends with."""
        return self in (Status.FINISHED, Status.FAILED, Status.KILLED)


def numbers(values: object) -> dict[str, float]:
    """Of a mapping the entries that are numbers, by names that can be shown; empty where it is none."""
    found = values.items() if isinstance(values, Mapping) else ()
    named = [(name, one) for name, one in found if isinstance(name, str) and name.isprintable()]
    largest = sys.float_info.max
    return {name: one for name, one in named if type(one) is float or (type(one) is int and abs(one) <= largest)}


Numbers = Annotated[dict[str, float], PlainValidator(numbers)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Milliseconds = Count  # since 1970


@dataclass
class Result:
    """How a run ended, its last numbers; where that was not written, as by a power cut, it says RUNNING."""

    FILE: ClassVar = "result.json"
    status: Status = Status.RUNNING
    resumable: bool = False  # whether a run that ended early can go on
    run_id: str | None = None
    run_name: str | None = None
    command: str | None = None
    protocol: str | None = None
    pruned: bool = False  # it was ended early, as no better than others were by then
    metrics: Numbers = field(default_factory=dict)  # the last value of each
    seconds: Numbers = field(default_factory=dict)  # what was spent on each part


@dataclass
class MlflowRecord:
    """All that makes the MLflow run of a run or a sweep."""

    FILE: ClassVar = "mlflow.json"
    name: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    started: Milliseconds = 0
    ended: Milliseconds | None = None
    run_id: str | None = None  # once MLflow has said it
    register: str | None = None  # by what name its best and last models go into the registry when it has finished
    kept: list[str] | None = None  # the checkpoints that are there, where older ones are deleted as new ones come
    notes: list[str] = field(default_factory=list)  # earlier descriptions: another one was edited by a person


@dataclass
class ProcessRecord:
    """Which process makes a run, so that nobody takes another one for it; None where the system does not tell.

    A pid alone is used again and means something within its namespace (a container's) only; the boot's id tells
    machines of one name, and a machine from itself after a restart.
    """

    FILE: ClassVar = "process.json"
    host: str | None = None
    boot_id: str | None = None
    pid_namespace: str | None = None
    pid: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    pid_started: float | None = None  # seconds, see `provenance.pid_started`
    started: str | None = None  # when it took the run, with the time zone


@dataclass
class JobRecord:
    """Which job of a sweep a run is."""

    FILE: ClassVar = "job.json"
    key: str = ""  # of everything that its numbers come from, see `identity.fingerprint`
    dials: str = ""  # the same of its config alone
    overrides: list[str] = field(default_factory=list)
    error: str | None = None  # why it failed, in one line


@dataclass
class SweepRecord:
    """What a sweep is, in its own folder; where its file is torn, nobody knows how it stands."""

    FILE: ClassVar = "sweep.json"
    name: str = ""
    command: str = ""
    identity: str = ""  # by which the same sweep, issued again, is known
    swept: dict[str, str] = field(default_factory=dict)  # what stands behind each swept key
    jobs: Count = 0  # how many were asked for last
    status: Status = Status.UNKNOWN
    started: Milliseconds = 0
    ended: Milliseconds | None = None
    best: str | None = None  # folder of the best run


@dataclass
class SplitRecord:
    """A part of the report on what a run is trained and measured on; what else it says is for people."""

    FILE: ClassVar = "data.json"  # that of all splits
    source: str = ""
    documents: Count = 0
    tokens: Count = 0
    chunks: Count = 0
    sha256: str = ""  # of its rows
    content_sha256: str | None = None  # of its texts
    protocol_parts: dict[str, Any] = field(default_factory=dict)  # of held-out documents: what the protocol's id is of


class Record(Protocol):
    """A dataclass that knows its file."""

    FILE: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)


def read(kind: type[R], folder: Path, notes: list[str] | None = None) -> R | None:
    """A record of a folder; None where it has none. What a file holds is never a reason to fail.

    What is of another type counts as absent; of a file that is torn, all of it does, and ``notes`` gets a line.
    """
    found = _object(folder / kind.FILE, notes)
    return None if found is None else parsed(kind, found)


def read_splits(folder: Path, notes: list[str] | None = None) -> dict[str, SplitRecord]:
    """The splits of ``data.json`` by name, read as `read` reads."""
    found = _object(folder / SplitRecord.FILE, notes) or {}
    return {name: parsed(SplitRecord, split) for name, split in found.items() if isinstance(split, dict)}


def parsed(kind: type[R], found: Mapping[str, Any]) -> R:
    """A record of what is usable of these values."""
    usable = {}
    for name, adapter in _adapters(kind).items():
        with contextlib.suppress(KeyError, ValidationError):
            usable[name] = adapter.validate_python(found[name])
    return kind(**usable)


def _object(path: Path, notes: list[str] | None) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) and notes is not None:
        notes.append(f"{path.name} cannot be read")
    return found if isinstance(found, dict) else {}


def write(record: Record, folder: Path) -> None:
    """Write a record's file, whole or not at all."""
    whole.write(folder / record.FILE, as_json(asdict(record)))


def as_json(value: object) -> str:
    """A file's text: numbers stay what they are, secrets do not."""
    return json.dumps(redacted(value), indent=2, ensure_ascii=False) + "\n"


@cache
def _adapters(kind: type[Record]) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return {one.name: TypeAdapter(hints[one.name]) for one in fields(kind)}


def milliseconds() -> int:
    """What time it is, in milliseconds since 1970, as records and MLflow count."""
    return int(time.time() * 1000)


def milliseconds_of(moment: str) -> int:
    """A time as text, such as `moment`, in the same."""
    return int(datetime.fromisoformat(moment).timestamp() * 1000)


def moment() -> str:
    """What time it is, with the time zone: ``2026-01-01T00:00:00+01:00``."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
