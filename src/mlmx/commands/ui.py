"""``ui``: the MLflow UI on the configured store, for this machine only unless asked otherwise."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import sqlite3
import subprocess
import sys

from mlmx.config.errors import RequestError, require
from mlmx.config.schema import Job, UiConfig
from mlmx.tracking.store import Store, bound_store, trouble

ANY = ("0.0.0.0", "::")  # all addresses of this machine
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def store_of(cfg: UiConfig) -> Store:
    """The local store the UI is to show."""
    store = bound_store(cfg.tracking)
    if store is None or store.artifacts is None:
        address = f"; {trouble(store) or f'open {store.uri} instead'}" if store else ""
        raise RequestError(f"tracking={cfg.tracking.get('name')}: ui shows the local store{address}")
    path = store.artifacts.parent / "mlflow.db"
    first = "train something first: python -m mlmx train experiment=demo"
    require(path.exists(), f"no MLflow store at {path} yet; {first}")
    if wrong := trouble(store):
        raise RequestError(wrong)
    return store


def check(cfg: UiConfig) -> None:
    """There is a store to show, the address is of this machine alone unless asked otherwise, and the port is free."""
    if not cfg.expose and not is_loopback(cfg.host):
        danger = "would let other machines read and change the runs, without a password"
        raise RequestError(f"host={cfg.host}: {danger}; leave it out, or add expose=true in a network you trust")
    store_of(cfg)
    try:
        family, *_, found = socket.getaddrinfo(cfg.host, cfg.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RequestError(f"host={cfg.host}: is no address of this machine ({error.strerror})") from error
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind(found)
        except OSError as error:
            what = f"port={cfg.port}: cannot be used ({error.strerror}); choose another, such as port={cfg.port + 1}"
            if error.errno == errno.EADDRNOTAVAIL:
                what = f"host={cfg.host}: is no address of this machine ({error.strerror})"
            raise RequestError(what) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ui(cfg: UiConfig, job: Job) -> None:
    """Serve until interrupted; no job workers, no telemetry, no other host unless asked for."""
    store = store_of(cfg)
    if not is_loopback(cfg.host):
        warning = f"whoever reaches {cfg.host}:{cfg.port} can read, change and delete the runs; there is no password"
        print(f"mlmx: warning: {warning}", file=sys.stderr, flush=True)
    print(f"MLflow UI on {address(cfg, store)} for {store.uri}; Ctrl-C ends it", flush=True)
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PYTHONWARNINGS": "ignore"}
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | quiet
    command = [sys.executable, "-m", "mlflow", "server", "--host", cfg.host, "--port", str(cfg.port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]  # one line per request would scroll the address away
    command += ["--backend-store-uri", store.uri, "--default-artifact-root", str(store.artifacts)]
    server = subprocess.Popen([*command, *allowed(cfg)], env=environment)
    try:
        code = server.wait()
    finally:
        server.terminate()  # it ends its own server process
        server.wait()
    if code not in (0, -2, -15):
        raise RuntimeError(f"mlflow server ended with exit code {code}")


def allowed(cfg: UiConfig) -> list[str]:
    """MLflow's options for the names it may be called by: a foreign page must not reach it by a name of its own.

    MLflow's own rule lets in every name that begins with ``10.`` or ``192.168.``, and, on other addresses than those of
    this machine, blocks its own pages. What the environment says is left to it (``MLFLOW_SERVER_ALLOWED_HOSTS``,
    ``MLFLOW_SERVER_CORS_ALLOWED_ORIGINS``).
    """
    names = [*LOOPBACK, *sorted(_names(cfg.host) - {*LOOPBACK, *ANY, "[::]"})]
    # Any port: a tunnel may lead here from another one. The brackets of an address are no pattern.
    hosts = [form for name in names for form in (name, f"{name.replace('[', '[[]')}:*")]
    options = []
    if "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ:
        options += ["--allowed-hosts", ",".join(hosts)]
    if not is_loopback(cfg.host) and "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS" not in os.environ:
        options += ["--cors-allowed-origins", ",".join(f"http://{name}:{cfg.port}" for name in names)]
    return options


def _names(host: str) -> set[str]:
    """What other machines may call this one, as it stands in an address; only its own name on loopback."""
    if host not in ANY:
        return {_in_url(host)}
    found = {socket.gethostname(), socket.getfqdn()}
    with contextlib.suppress(OSError):
        found |= {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))  # sends nothing: asks which of its addresses would be used
        found.add(route.getsockname()[0])
    return {_in_url(name) for name in found}


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def address(cfg: UiConfig, store: Store) -> str:
    """The page that lists the experiment's runs: left to itself, MLflow opens on its views of LLM applications."""
    host = socket.gethostname() if cfg.host in ANY else _in_url(cfg.host)
    root, found = f"http://{host}:{cfg.port}", None
    with contextlib.suppress(sqlite3.Error):
        path = store.uri.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path)) as database:
            query = "SELECT experiment_id FROM experiments WHERE name = ?"
            found = database.execute(query, (store.experiment,)).fetchone()
    return f"{root}/#/experiments/{found[0]}/runs?workflowType=machine_learning" if found else root
