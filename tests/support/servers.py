"""Real MLflow servers that can be killed and started again, and what may stand between them and a run."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PATIENCE_SECONDS = 500  # a start takes some 15 s of a core
OPTIONS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``mlflow server`` on loopback, with its database and artifacts in a folder that outlives it.

    Args:
        migrated: a database to begin with a copy of; or the address of one elsewhere.
    """

    def __init__(self, folder: Path, migrated: Path | str) -> None:
        self.folder, self.port = folder, free_port()
        self.database, self.artifacts = folder / "mlflow.db", folder / "artifacts"
        self.backend = migrated if isinstance(migrated, str) else f"sqlite:///{self.database}"
        if isinstance(migrated, Path):
            shutil.copy(migrated, self.database)  # migrating one takes seconds
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """From here on it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.backend]
        command += ["--artifacts-destination", str(self.artifacts)]
        with (self.folder / "server.log").open("ab") as out:
            self.process = subprocess.Popen(
                command, env=os.environ | OPTIONS, stdout=out, stderr=out, cwd=self.folder, start_new_session=True
            )
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError((self.folder / "server.log").read_text())
            time.sleep(0.1)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def kill(self) -> None:
        """SIGKILL, to it and the processes it has started."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def serving(folder: Path, migrated: Path | str) -> Iterator[Server]:
    """A server from when it answers; killed at the end."""
    server = Server(folder, migrated)
    try:
        server.start()
        yield server
    finally:
        server.kill()


POSTGRES_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))


def postgres_program(name: str) -> str | None:
    """Debian keeps most of them off the path."""
    return shutil.which(name, path=os.pathsep.join([*map(str, reversed(POSTGRES_FOLDERS)), os.environ["PATH"]]))


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """An empty PostgreSQL database on loopback, in a folder of its own; its address for MLflow."""
    initdb, server, ready = (postgres_program(name) or name for name in ("initdb", "postgres", "pg_isready"))
    # It does not run as root, nor below pytest's folders, which are root's alone.
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    folder, port = Path(tempfile.mkdtemp(prefix="mlmx-postgres-")), free_port()
    process: subprocess.Popen[bytes] | None = None
    try:
        if user:
            shutil.chown(folder, "postgres", "postgres")
        make = [initdb, "-D", str(folder / "data"), "-U", "mlmx", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)
        serve = [server, "-D", str(folder / "data"), "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
        serve += ["-c", "listen_addresses=127.0.0.1"]
        with (folder / "log").open("ab") as out:
            process = subprocess.Popen(serve, stdout=out, stderr=out, cwd=folder, **user)
        end = time.monotonic() + PATIENCE_SECONDS
        while subprocess.run([ready, "-q", "-h", "127.0.0.1", "-p", str(port)], check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError((folder / "log").read_text())
            time.sleep(0.1)
        yield f"postgresql+psycopg2://mlmx@127.0.0.1:{port}/postgres"
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # its fast way of shutting down
            process.wait(60)
        shutil.rmtree(folder)


class Way:
    """A proxy in front of a server: what comes through, and what becomes of it, is for the test to say.

    Attributes:
        refusal: an HTTP status that everything is answered with.
        hangs_up: nothing is answered, and nothing arrives.
        loses_answers: everything arrives, and nothing is answered.
        seconds: that every answer takes longer.
        open: while it is not set, answers wait for it.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.clear()
        self.open = threading.Event()
        self.open.set()
        way = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):  # whoever asked has gone
                    super().handle_one_request()

            def log_message(self, *_: object) -> None:
                pass

            def __getattr__(self, name: str) -> object:
                if name.startswith("do_"):
                    return lambda: way.pass_on(self)
                raise AttributeError(name)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,))
        self.thread.start()

    def clear(self) -> None:
        """All is well again."""
        self.refusal: int | None = None
        self.hangs_up = self.loses_answers = False
        self.seconds = 0.0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        refusal, hangs_up, loses, seconds = self.refusal, self.hangs_up, self.loses_answers, self.seconds
        body = _body(request)
        if hangs_up:
            request.close_connection = True
            return
        if refusal is not None:
            self._answer(request, refusal, b'{"error_code": "INTERNAL_ERROR", "message": "no"}', "application/json")
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        with contextlib.closing(connection):
            own = ("host", "transfer-encoding", "content-length")
            headers = {name: value for name, value in request.headers.items() if name.lower() not in own}
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            status, kind, answer = response.status, response.getheader("Content-Type") or "", response.read()
        if loses:
            request.close_connection = True
            return
        time.sleep(seconds)
        self.open.wait()
        self._answer(request, status, answer, kind)

    def _answer(self, request: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def close(self) -> None:
        self.open.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def _body(request: BaseHTTPRequestHandler) -> bytes:
    """What was sent along, also piece by piece (an empty file is)."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body
