"""Where MLflow keeps its records: a local store is made once and whole, and what is wrong with one is said in a line.

Looks at stores without loading MLflow; only making and asking one does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import shlex
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from mlmx.config.errors import WorkError, brief, require
from mlmx.config.options import bind, table
from mlmx.config.paths import outputs_dir
from mlmx.runs.run import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Found

SQLITE = "sqlite:///"
# Disks whose other machines do not see the memory that a write-ahead log is shared by.
OF_A_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse", "lustre", "gpfs", "beegfs", "ceph", "afs", "gfs", "ocfs")
# Before MLflow is imported: nothing is sent to its makers or printed, and a call that fails does so in seconds and
# only once, for whoever sends tries again.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # failures are said by us, without a traceback
}
# What MLflow's pages compare runs by unless told otherwise, and that these are no LLM applications.
EXPERIMENT_TAGS = {
    "mlflow.experiment.primaryMetric.name": "heldout/loss",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
    "mlflow.experimentKind": "custom_model_development",
}
PAGE = 1000  # runs or experiments that MLflow gives at a time


@dataclass(frozen=True)
class Store:
    """An MLflow store."""

    uri: str  # absolute
    experiment: str
    artifacts: Path | None  # where local ones lie; else they are the server's
    system_metrics: bool = field(default=False, compare=False)  # whether a run samples the machine for it

    @property
    def database(self) -> Path | None:
        """The file of a local store; None for a server's."""
        return Path(self.uri.removeprefix(SQLITE)) if self.uri.startswith(SQLITE) else None


def local(*, experiment: str = "mlmx", system_metrics: bool = False) -> Store:
    """sqlite and files below outputs/, at an absolute address."""
    outputs = outputs_dir()
    return Store(f"{SQLITE}{outputs / 'mlflow.db'}", experiment, outputs / "mlartifacts", system_metrics)


def server(*, uri: str, experiment: str = "mlmx", system_metrics: bool = False) -> Store:
    """A running MLflow server, for example ``tracking=server tracking.uri=http://127.0.0.1:5000``."""
    is_address = uri.startswith(("http://", "https://"))
    require(is_address, f"tracking.uri={uri}: must be the address of an MLflow server, http://… or https://…")
    return Store(uri, experiment, None, system_metrics)


def none() -> None:
    """No MLflow; the run folder holds everything."""


TRACKINGS: dict[str, Callable[..., Store | None]] = table(local, server, none)


def bound_store(options: Mapping[str, Any]) -> Store | None:
    """The store that a config's ``tracking`` asks for; None for none, `RequestError` for what is no store."""
    (named,) = bind("tracking", options, TRACKINGS)
    store: Store | None = named()
    return store


def store_of(run: Run) -> Store | None:
    """Where a run of this or an earlier day is recorded besides its folder; None where nowhere, or nobody can tell."""
    try:
        return bound_store(run.config().tracking)
    except Exception:  # noqa: BLE001 (of many kinds: it is of another version, torn, or gone meanwhile)
        return None


def file_of(store: Store) -> tuple[int, int] | None:
    """Which file a local store is, whatever its name; None for a server's. `OSError` where it is not there."""
    found = store.database and store.database.stat()
    return (found.st_dev, found.st_ino) if found else None


def make(store: Store) -> None:
    """Make a local store where there is none, in its newest schema; one that is there is looked at only.

    It is migrated under another name and then renamed: a process that is killed meanwhile leaves no half of one, and
    those that start together find either none or all of it. `WorkError` where the one that is there cannot be used:
    MLflow itself would try for 100 s to open it, or, if it has another schema, migrate some unasked.
    """
    if store.database is None or store.artifacts is None:
        return
    store.artifacts.mkdir(parents=True, exist_ok=True)
    path = store.database.resolve()
    if not path.exists():
        with FileLock(store.artifacts.parent / ".mlflow.lock"):
            if not path.exists():
                _make(path, store.artifacts)
    if wrong := trouble(store):
        raise WorkError(wrong)


def _make(path: Path, artifacts: Path) -> None:
    _set_up()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    aside = path.with_name(f".{path.name}.new")
    for half, ending in itertools.product((aside, path), ("", "-wal", "-shm")):
        half.with_name(half.name + ending).unlink(missing_ok=True)  # a log alone would be taken for the new one's
    made = SqlAlchemyStore(f"{SQLITE}{aside}", artifacts.as_uri())  # type: ignore[no-untyped-call]
    made.engine.dispose()  # nothing stays open
    if not is_of_a_network(aside):  # readers and a writer then do not wait for each other; it stays in the file
        with contextlib.closing(sqlite3.connect(aside)) as opened:
            opened.execute("PRAGMA journal_mode=WAL")
    aside.rename(path)


def is_of_a_network(path: Path) -> bool:
    """Whether other machines may see the disk of a file, as far as Linux tells."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines() if mounts.is_file() else []
    kinds = [line.rpartition(" - ")[2].split()[0] for line in lines if line.split()[2] == number]
    return any(kind.startswith(OF_A_NETWORK) for kind in kinds)


def reason(error: Exception, store: Store) -> str:
    """Why a store did not take something, in one line: what can be seen of it, else what MLflow says."""
    return trouble(store) or brief(error)


def trouble(store: Store) -> str | None:
    """Why a store cannot be used, and what to do, in one line; None where nothing is wrong that can be seen."""
    path, uri = store.database, store.uri
    if path is None:
        try:  # whether somebody answers there, whatever the answer
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=3.0).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                return f"{uri} answers with {error.code} {error.reason}; look after the server"
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or error
            return f"{uri} does not answer ({why}); start the server, or correct tracking.uri"
        return None
    if not path.exists() and path.parent.is_dir():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as opened:
            opened.execute("SELECT count(*) FROM sqlite_master")
            opened.execute("BEGIN IMMEDIATE")
            opened.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if path.is_dir():
            return f"{path} is a folder, not an MLflow store; move it away"
        if "locked" not in str(error):  # by somebody who can use it
            there = "make it and its folder writable, or set MLMX_OUTPUTS=<folder>"
            return f"{path} cannot be written to ({error}); {there}"
    except sqlite3.DatabaseError as error:
        return f"{path} is no MLflow store ({error}); move it away, then python -m mlmx sync run=all fills a new one"
    wanted, found = newest_schema(), None
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=20)) as opened:
        found = next(iter(opened.execute("SELECT version_num FROM alembic_version")), (None,))[0]
    if found in (None, wanted) or wanted is None:
        return None
    other = f"{path} has the schema of another version of MLflow ({found}, this one has {wanted})"
    return f"{other}; make a copy of it, then: mlflow db upgrade {shlex.quote(uri)}"


@cache
def newest_schema() -> str | None:
    """The schema of the installed MLflow: the migration that no other one follows; None where that cannot be told."""
    found = importlib.util.find_spec("mlflow")
    mlflow = Path((found.origin if found else None) or "").parent
    made, followed = set[str](), set[str]()
    for script in (mlflow / "store" / "db_migrations" / "versions").glob("*.py"):
        for line in re.findall(r"^(?:down_)?revision\b.*$", script.read_text(encoding="utf-8"), re.MULTILINE):
            (followed if line.startswith("down_") else made).update(re.findall(r"['\"](\w+)['\"]", line))
    newest = made - followed
    return newest.pop() if len(newest) == 1 else None


def client_of(store: Store) -> MlflowClient:
    """MLflow's client of a store, which is not looked at."""
    _set_up()
    from mlflow import MlflowClient

    return MlflowClient(store.uri)


def _set_up() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(store: Store) -> tuple[MlflowClient, str]:
    """A client and the experiment's id; a local store and the experiment are made on first use."""
    make(store)
    client = client_of(store)
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(store.experiment)
    if known is None:
        location = store.artifacts.as_uri() if store.artifacts else None
        try:
            return client, str(client.create_experiment(store.experiment, location, EXPERIMENT_TAGS))
        except MlflowException:
            known = client.get_experiment_by_name(store.experiment)
            if known is None:  # else another process was faster
                raise
    return client, str(known.experiment_id)


def pages(ask: Callable[..., Any]) -> Iterator[Any]:
    """All that MLflow gives page by page, each asked for by ``page_token``."""
    token: str | None = None
    while token != "":
        page = ask(page_token=token)
        yield from page
        token = page.token or ""


def experiments_of(client: MlflowClient) -> dict[str, str]:
    """Name and id of each."""
    return {one.name: one.experiment_id for one in pages(partial(client.search_experiments, max_results=PAGE))}


def found_runs(client: MlflowClient, wanted: str, experiments: Iterable[str] | None = None) -> list[Found]:
    """The runs that a filter of MLflow's finds, oldest first; in these experiments, else in all of the store."""
    where = list(experiments_of(client).values() if experiments is None else experiments)
    oldest = ["attributes.start_time ASC"]
    return list(pages(partial(client.search_runs, where, wanted, max_results=PAGE, order_by=oldest)))
