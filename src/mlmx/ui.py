"""``ui``: the MLflow UI on the configured store, for this machine only."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
from functools import partial
from typing import Any

from mlmx import tracking
from mlmx.config import Job, RequestError, UiConfig, bind, require

HOST = "127.0.0.1"


def store_of(cfg: UiConfig) -> tracking.Store:
    """The local store the UI is to show."""
    bound: partial[Any] = bind("tracking", cfg.tracking, tracking.TRACKINGS)[0]
    store: tracking.Store | None = bound()
    if store is None or store.artifacts is None:
        address = f"; open {store.uri} instead" if store else ""
        raise RequestError(f"tracking={cfg.tracking.get('name')}: ui shows the local store{address}")
    path = store.artifacts.parent / "mlflow.db"
    require(
        path.is_file(),
        f"no MLflow store at {path} yet; train something first: python -m mlmx train experiment=demo",
    )
    return store


def check(cfg: UiConfig) -> None:
    """There is a store to show and the port is free."""
    store_of(cfg)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind((HOST, cfg.port))
        except OSError as error:
            raise RequestError(
                f"port={cfg.port}: cannot be used ({error.strerror}); choose another, such as port={cfg.port + 1}"
            ) from error


def ui(cfg: UiConfig, job: Job) -> None:
    """Serve until interrupted; no job workers, no telemetry, no other host."""
    store = store_of(cfg)
    print(f"MLflow UI on {address(cfg.port, store)} for {store.uri}; Ctrl-C ends it", flush=True)
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(cfg.port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]  # one line per request would scroll the address away
    command += ["--backend-store-uri", store.uri, "--default-artifact-root", str(store.artifacts)]
    server = subprocess.Popen(command, env=environment)
    try:
        code = server.wait()
    finally:
        server.terminate()  # it ends its own server process
        server.wait()
    if code not in (0, -2, -15):
        raise RuntimeError(f"mlflow server ended with exit code {code}")


def address(port: int, store: tracking.Store) -> str:
    """The page that lists the experiment's runs: left to itself, MLflow opens on its views of LLM applications."""
    root, found = f"http://{HOST}:{port}", None
    with contextlib.suppress(sqlite3.Error):
        path = store.uri.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path)) as database:
            query = "SELECT experiment_id FROM experiments WHERE name = ?"
            found = database.execute(query, (store.experiment,)).fetchone()
    return f"{root}/#/experiments/{found[0]}/runs?workflowType=machine_learning" if found else root
