"""Where MLflow keeps its records: a local store is made once and whole, and what is wrong with one is said in a line.

Looks at stores without loading MLflow; only making and asking one does.
"""

from __future__ import annotations

import contextlib
import importlib.util
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
ANSWER_SECONDS = 3.0
BESIDE = ("-wal", "-shm")  # what sqlite keeps beside a database while it is in use
# Disks whose other machines do not see the memory that a write-ahead log is shared by.
OF_A_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse", "lustre", "gpfs", "beegfs", "ceph", "afs", "gfs", "ocfs")


@dataclass(frozen=True)
class Store:
    """An MLflow store: its absolute address, the experiment, and where local artifacts lie (None: the server's).

    Attributes:
        system_metrics: whether a run samples the machine for it.
    """

    uri: str
    experiment: str
    artifacts: Path | None
    system_metrics: bool = field(default=False, compare=False)


def local(*, experiment: str = "mlmx", system_metrics: bool = False) -> Store:
    """sqlite and files below outputs/, at an absolute address."""
    outputs = outputs_dir()
    return Store(f"sqlite:///{outputs / 'mlflow.db'}", experiment, outputs / "mlartifacts", system_metrics)


def server(*, uri: str, experiment: str = "mlmx", system_metrics: bool = False) -> Store:
    """A running MLflow server, for example ``tracking=server tracking.uri=http://127.0.0.1:5000``."""
    require(
        uri.startswith(("http://", "https://")),
        f"tracking.uri={uri}: must be the address of an MLflow server, http://… or https://…",
    )
    return Store(uri, experiment, None, system_metrics)


def none() -> None:
    """No MLflow; the run folder holds everything."""


def reason(error: Exception, store: Store) -> str:
    """Why a store did not take something, in one line: what can be seen of it, else what MLflow says."""
    return trouble(store) or brief(error)


TRACKINGS: dict[str, Callable[..., Store | None]] = table(local, server, none)


def bound_store(options: Mapping[str, Any]) -> Store | None:
    """The store that a config's ``tracking`` asks for; None for none.

    Raises:
        RequestError: an unknown name or option, a wrong type or value.
    """
    (named,) = bind("tracking", options, TRACKINGS)
    store: Store | None = named()
    return store


def store_of(run: Run) -> Store | None:
    """Where a run of this or an earlier day is recorded besides its folder; None where nowhere, or nobody can tell."""
    try:
        return bound_store(run.config().tracking)
    except Exception:  # noqa: BLE001 (of many kinds: it is of another version, torn, or gone meanwhile)
        return None


def database(store: Store) -> Path | None:
    """The file of a local store; None for a server's."""
    return Path(store.uri.removeprefix(SQLITE)) if store.uri.startswith(SQLITE) else None


def file_of(store: Store) -> tuple[int, int] | None:
    """Which file a local store is, whatever its name; None for a server's.

    Raises:
        OSError: it is not there.
    """
    path = database(store)
    if path is None:
        return None
    found = path.stat()
    return found.st_dev, found.st_ino


def require_still(store: Store, file: tuple[int, int] | None) -> None:
    """Refuse to write to a file that was moved, deleted or replaced since: with a write-ahead log sqlite would not
    notice, and what it wrote would be lost with the file.

    Raises:
        OSError: it was.
    """
    if file_of(store) != file:
        raise FileExistsError(f"{database(store)} was replaced by another file while this run wrote to it")


# -------------------------------------------------------------------------------------------- making one


def make(store: Store) -> None:
    """Make a local store where there is none, in its newest schema; one that is there is looked at only.

    It is migrated under another name and then renamed: a process that is killed meanwhile leaves no half of one, and
    those that start together find either none or all of it.

    Raises:
        WorkError: the one that is there cannot be used. MLflow itself would try for 100 s to open it, or, if it has
            another schema, migrate some unasked.
    """
    path = database(store)
    if path is None or store.artifacts is None:
        return
    store.artifacts.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    if not path.exists():
        with FileLock(store.artifacts.parent / ".mlflow.lock"):
            if not path.exists():
                _make(path, store.artifacts)
    if wrong := trouble(store):
        raise WorkError(wrong)


def _make(path: Path, artifacts: Path) -> None:
    aside = path.with_name(f".{path.name}.new")
    for leftover in (*_all_of(aside), *_all_of(path)):  # a log without its database would be taken for the new one's
        leftover.unlink(missing_ok=True)
    _migrate(f"{SQLITE}{aside}", artifacts)
    _write_ahead(aside)
    aside.rename(path)


def _migrate(uri: str, artifacts: Path) -> None:
    """Make the tables of a database that has none; nothing stays open."""
    _set_up()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    made = SqlAlchemyStore(uri, artifacts.as_uri())  # type: ignore[no-untyped-call]
    made.engine.dispose()


def _all_of(path: Path) -> list[Path]:
    return [path, *(path.with_name(path.name + ending) for ending in BESIDE)]


def _write_ahead(path: Path) -> None:
    """Readers and a writer do not wait for each other (the setting stays in the file); not on a network's disk."""
    if is_of_a_network(path):
        return
    with contextlib.closing(sqlite3.connect(path)) as opened:
        opened.execute("PRAGMA journal_mode=WAL")


def is_of_a_network(path: Path) -> bool:
    """Whether other machines may see the disk of a file, as far as Linux tells."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines() if mounts.is_file() else []
    kinds = [line.rpartition(" - ")[2].split()[0] for line in lines if line.split()[2] == number]
    return any(kind.startswith(OF_A_NETWORK) for kind in kinds)


# ------------------------------------------------------------------------------------------- looking at one


def trouble(store: Store) -> str | None:
    """Why a store cannot be used, and what to do, in one line; None where nothing is wrong that can be seen."""
    path = database(store)
    if path is None:
        return _silence(store.uri)
    return None if not path.exists() and path.parent.is_dir() else _unreadable(path) or _other_schema(path, store.uri)


def _silence(uri: str) -> str | None:
    """Whether somebody answers there, whatever the answer."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS).close()
        return None
    except urllib.error.HTTPError as error:
        answer = f"{uri} answers with {error.code} {error.reason}"
        return None if error.code < 500 else f"{answer}; look after the server"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return f"{uri} does not answer ({reason}); start the server, or correct tracking.uri"


def _unreadable(path: Path) -> str | None:
    """What sqlite says of a file that it is to write to."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as opened:
            opened.execute("SELECT count(*) FROM sqlite_master")
            opened.execute("BEGIN IMMEDIATE")
            opened.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):  # by somebody who can use it
            return None
        if path.is_dir():
            return f"{path} is a folder, not an MLflow store; move it away"
        return f"{path} cannot be written to ({error}); make it and its folder writable, or set MLMX_OUTPUTS=<folder>"
    except sqlite3.DatabaseError as error:
        return f"{path} is no MLflow store ({error}); move it away, then python -m mlmx sync run=all fills a new one"
    return None


def _other_schema(path: Path, uri: str) -> str | None:
    """Whether a store was made by another version of MLflow."""
    wanted, found = newest_schema(), None
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=20)) as opened:
        found = next(iter(opened.execute("SELECT version_num FROM alembic_version")), (None,))[0]
    if found in (None, wanted) or wanted is None:
        return None
    return (
        f"{path} has the schema of another version of MLflow ({found}, this one has {wanted}); make a copy of it, "
        f"then: mlflow db upgrade {shlex.quote(uri)}"
    )


@cache
def newest_schema() -> str | None:
    """The schema of the installed MLflow: the migration that no other one follows; None where that cannot be told."""
    found = importlib.util.find_spec("mlflow")
    folders = found.submodule_search_locations if found else None
    versions = Path(next(iter(folders or ()), "")) / "store" / "db_migrations" / "versions"
    made: set[str] = set()
    followed: set[str] = set()
    for script in versions.glob("*.py"):
        for line in re.findall(r"^(?:down_)?revision\b.*$", script.read_text(encoding="utf-8"), re.MULTILINE):
            named = re.findall(r"['\"](\w+)['\"]", line)
            (followed if line.startswith("down_") else made).update(named)
    newest = made - followed
    return newest.pop() if len(newest) == 1 else None


# ------------------------------------------------------------------------------------------- asking one

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
    if known is not None:
        return client, str(known.experiment_id)
    location = store.artifacts.as_uri() if store.artifacts else None
    try:
        return client, str(client.create_experiment(store.experiment, location, EXPERIMENT_TAGS))
    except MlflowException:
        known = client.get_experiment_by_name(store.experiment)
        if known is None:
            raise
        return client, str(known.experiment_id)  # another process was faster


def pages(ask: Callable[..., Any]) -> Iterator[Any]:
    """All that MLflow gives page by page.

    Args:
        ask: for a page, by ``page_token``.
    """
    token = None
    while True:
        page = ask(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def experiments_of(client: MlflowClient) -> dict[str, str]:
    """Name and id of each."""
    return {one.name: one.experiment_id for one in pages(partial(client.search_experiments, max_results=PAGE))}


def found_runs(client: MlflowClient, wanted: str, experiments: Iterable[str] | None = None) -> list[Found]:
    """The runs that a filter of MLflow's finds, oldest first; in these experiments, else in all of the store."""
    where = list(experiments_of(client).values() if experiments is None else experiments)
    order = ["attributes.start_time ASC"]
    return list(pages(partial(client.search_runs, where, wanted, max_results=PAGE, order_by=order)))
