"""Where a run comes from: commit, command, machine, process."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import distributions, version
from pathlib import Path

from mlmx import __version__
from mlmx.config.redaction import redact
from mlmx.runs.records import ProcessRecord
from mlmx.runs.run import Run

log = logging.getLogger("mlmx")
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "hydra-core", "mlflow")
# Tags that MLflow itself reads: what a run is nested under, and its description in markdown.
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"
GIB = 2**30
UNTOLD = (OSError, RuntimeError)  # what psutil raises where /proc is not there, or holds less than it should
PACKAGES_FILE, DIFF_FILE = "packages.txt", "git.diff"  # what a run was made with, in its folder
MOST_DIFF_BYTES = 2**20
PATIENCE_SECONDS = 5.0  # at the end of a run that was shorter than keeping these takes
PROCESS_TAGS = ("mlmx.host", "mlmx.boot_id", "mlmx.pid_namespace", "mlmx.pid", "mlmx.pid_started")


def tags() -> dict[str, str]:
    """Tags of an MLflow run that say how to make it again."""
    return {
        "mlmx.version": __version__,
        **process_tags(),
        **machine(),
        "mlmx.python": platform.python_version(),
        "mlflow.source.name": "mlmx",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown",
        **code(),
    }


def process_tags() -> dict[str, str]:
    """Those that say which process is at a run."""
    return {f"mlmx.{name}": str(value) for name, value in asdict(process()).items() if value is not None}


@cache  # asked once: this process runs the code that it has loaded
def code() -> Mapping[str, str]:
    """Versions of what computes, and the commit of this code; an installed wheel has none."""
    found = {"mlmx.packages": " ".join(f"{name}=={version(name)}" for name in PACKAGES)}
    if (source := checkout()) and (commit := git(source, "rev-parse", "HEAD")):
        found["mlflow.source.git.commit"] = commit
        found["mlmx.git_dirty"] = str(bool(git(source, "status", "--porcelain"))).lower()
    return found


def checkout() -> Path | None:
    """Where this code is under git; None of an installed wheel."""
    folder = Path(__file__).resolve().parents[3]
    return folder if (folder / ".git").exists() else None


@cache
def code_version() -> str:
    """Version of mlmx and a hash of its source: a change that was not committed is another version, too."""
    package = Path(__file__).resolve().parents[1]
    sources = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sources.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return f"{__version__}+{sources.hexdigest()[:12]}"


@cache
def process() -> ProcessRecord:
    """Which process this is."""
    boot_id, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return ProcessRecord(
        host=socket.gethostname(),
        boot_id=boot_id.read_text(encoding="ascii").strip() if boot_id.is_file() else None,
        pid_namespace=namespace.readlink().name if namespace.is_symlink() else None,
        pid=os.getpid(),
        pid_started=pid_started(os.getpid()),
    )


os.register_at_fork(after_in_child=process.cache_clear)


def pid_started(pid: int) -> float | None:
    """When a process began, in seconds; None where it is no more (a zombie has ended), or the system does not tell.

    Counted from the machine's own beginning on Linux, where psutil adds that one to it, by a clock that may be set
    meanwhile; elsewhere since 1970.
    """
    import psutil  # noqa: PLC0415 (a refused configuration does not load it)

    with contextlib.suppress(psutil.Error, *UNTOLD):
        found = psutil.Process(pid)
        if found.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return float(found.create_time() - (psutil.boot_time() if psutil.LINUX else 0))
    return None


def boot_time() -> float | None:
    """When this machine began, in seconds since 1970; None where the system does not tell."""
    import psutil  # noqa: PLC0415 (a refused configuration does not load it)

    with contextlib.suppress(*UNTOLD):
        return float(psutil.boot_time())
    return None


def machine() -> dict[str, str]:
    """Tags of what a run computes on: as ``NVIDIA H100 (79 GiB) · 8 × AMD EPYC · 31 GiB``, and by number, to filter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    info, memory, torch = Path("/proc/cpuinfo"), memory_bytes(), sys.modules.get("torch")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch else []
    named = re.search(r"^model name[^:\n]*:(.*)$", info.read_text("utf-8"), re.MULTILINE) if info.is_file() else None
    processor = named.group(1).strip() if named else platform.processor() or platform.machine()
    words = [f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus] + [f"{cores} × {processor}"]
    found = {"mlmx.cores": str(cores)}
    if memory:
        words.append(f"{memory / GIB:.0f} GiB")
        found["mlmx.memory_gib"] = f"{memory / GIB:.1f}"
    if gpus:
        least = min(gpu.total_memory for gpu in gpus)
        found |= {"mlmx.gpus": str(len(gpus)), "mlmx.gpu_memory_gib": f"{least / GIB:.1f}"}
    return {"mlmx.hardware": " · ".join(words), **found}


def memory_bytes() -> int | None:
    """Main memory that this process may use: the machine's, or what a container is given of it."""
    import psutil  # noqa: PLC0415 (a refused configuration does not load it)

    try:
        there = int(psutil.virtual_memory().total)
    except UNTOLD:
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max"
            there = min(there, int(Path(limit).read_text(encoding="ascii")))
    return there


def git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it fails, or is not there."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def kept(run: Run) -> Iterator[None]:
    """The files are written during the block, by a thread: the training does not wait for git or a slow disk."""

    def write() -> None:
        try:
            for name, text in ((PACKAGES_FILE, packages()), (DIFF_FILE, redact(changes()))):
                path = run.folder / name
                other = path.is_file() and path.read_text(encoding="utf-8") != text  # than it was begun with
                if text:
                    run.write_text(resumed_name(name) if other else name, text)
        except Exception as error:  # noqa: BLE001 (of whatever kind: the run does not need them)
            log.warning("%s: what it was made with could not be kept (%s)", run.folder, error)

    thread = threading.Thread(target=write, name="lineage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_SECONDS)


def resumed_name(name: str) -> str:
    """``git.diff`` → ``git.resumed.diff``."""
    return ".resumed.".join(name.rsplit(".", 1))


@cache
def packages() -> str:
    """As ``pip freeze`` lists them, headed by Python and the system."""
    # Of two of a name the first is imported.
    versions = {str(found.name): found.version for found in reversed(list(distributions()))}
    listed = "".join(f"{name}=={versions[name]}\n" for name in sorted(versions, key=str.lower))
    return f"# Python {platform.python_version()}, {platform.platform()}\n{listed}"


@cache
def changes() -> str:
    """The code's own changes since its commit, and the names of files that git does not know; at most 1 MiB."""
    folder = checkout()
    if folder is None or code().get("mlmx.git_dirty") != "true":
        return ""
    unknown = git(folder, "ls-files", "--others", "--exclude-standard") or ""
    head = "".join(f"# not known to git: {name}\n" for name in unknown.splitlines())
    # Neither colours nor programs that a user's settings may name; read no further than is kept.
    command = ["git", "-C", str(folder), "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        found = head.encode() + process.stdout.read(MOST_DIFF_BYTES + 1)
        process.kill()
    if len(found) <= MOST_DIFF_BYTES:
        return found.decode(errors="replace")
    whole = found[: found.rfind(b"\n", 0, MOST_DIFF_BYTES) + 1]
    return whole.decode(errors="replace") + f"# cut here: more than {MOST_DIFF_BYTES:,} bytes\n"
