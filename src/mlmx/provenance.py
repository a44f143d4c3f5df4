"""Where a run comes from: commit, command, machine, process."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "hydra-core", "mlflow")

# Tags that MLflow itself reads: what a run is nested under, and its description in markdown.
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"
PROCESS_TAGS = ("mlmx.host", "mlmx.boot_id", "mlmx.pid_namespace", "mlmx.pid", "mlmx.pid_started")


def tags() -> dict[str, str]:
    """Tags of an MLflow run that say how to make it again."""
    import mlmx

    return {
        "mlmx.version": mlmx.__version__,
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
    return {tag: str(value) for tag, value in zip(PROCESS_TAGS, process().values(), strict=True) if value is not None}


@cache  # asked once: this process runs the code that it has loaded
def code() -> Mapping[str, str]:
    """Versions of what computes, and the commit of this code; an installed wheel has none."""
    found = {"mlmx.packages": " ".join(f"{name}=={version(name)}" for name in PACKAGES)}
    source = checkout()
    commit = git(source, "rev-parse", "HEAD") if source else None
    if source and commit:
        found["mlflow.source.git.commit"] = commit
        found["mlmx.git_dirty"] = str(bool(git(source, "status", "--porcelain"))).lower()
    return found


def checkout() -> Path | None:
    """Where this code is under git; None of an installed wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / ".git").exists() else None


@cache
def code_version() -> str:
    """Version of mlmx and a hash of its source: a change that was not committed is another version, too."""
    import mlmx

    package = Path(__file__).parent
    sources = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sources.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return f"{mlmx.__version__}+{sources.hexdigest()[:12]}"


def process() -> dict[str, Any]:
    """Which process this is, so that nobody takes another one for it; None where the system does not tell.

    A pid alone is used again and means something within its namespace (a container's) only; the boot's id tells
    machines of one name, and a machine from itself after a restart.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot_id": boot_id.read_text(encoding="ascii").strip() if boot_id.is_file() else None,
        "pid_namespace": namespace.readlink().name if namespace.is_symlink() else None,
        "pid": os.getpid(),
        "pid_started": pid_started(os.getpid()),
    }


def pid_started(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None where it is no more, or /proc is not there."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = said.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])  # a zombie has ended; proc(5) counts the field as number 22


def boot_time() -> float | None:
    """When this machine began, in seconds since 1970."""
    try:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        return None


def machine() -> dict[str, str]:
    """Tags of what a run computes on: in words, and number by number, to filter by."""
    memory = memory_bytes()
    gpus = [bytes_ for _, bytes_ in _gpus()]
    return {
        "mlmx.hardware": hardware(),
        "mlmx.cores": str(_usable_cores()),
        **({"mlmx.memory_gib": _gib(memory)} if memory else {}),
        **({"mlmx.gpus": str(len(gpus)), "mlmx.gpu_memory_gib": _gib(min(gpus))} if gpus else {}),
    }


def hardware() -> str:
    """``2 × AMD EPYC · 31 GiB`` or ``NVIDIA H100 (79 GiB) · 8 × …``, as far as the system tells."""
    memory = memory_bytes()
    gpus = [f"{name} ({bytes_ / 2**30:.0f} GiB)" for name, bytes_ in _gpus()]
    own = [f"{_usable_cores()} × {_processor()}", *([f"{memory / 2**30:.0f} GiB"] if memory else [])]
    return " · ".join([*gpus, *own])


def _gib(bytes_: int) -> str:
    return f"{bytes_ / 2**30:.1f}"


def _gpus() -> list[tuple[str, int]]:
    """Name and bytes of each, where torch is loaded."""
    torch = sys.modules.get("torch")
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch else []
    return [(str(gpu.name), int(gpu.total_memory)) for gpu in found]


def memory_bytes() -> int | None:
    """Main memory that this process may use: the machine's, or what a container is given of it."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            there = min(there, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # "max"
            continue
    return there


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it fails, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
