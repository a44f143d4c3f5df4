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


PROCESS_TAGS = ("mlmx.host", "mlmx.boot_id", "mlmx.pid_namespace", "mlmx.pid", "mlmx.pid_started")


def tags() -> dict[str, str]:
    """Tags of an MLflow run that say how to make it again."""
    import mlmx

    return {
        "mlmx.version": mlmx.__version__,
        **process_tags(),
        "mlmx.hardware": hardware(),
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
    checkout = Path(__file__).resolve().parents[2]
    commit = _git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else None
    if commit:
        found["mlflow.source.git.commit"] = commit
        found["mlmx.git_dirty"] = str(bool(_git(checkout, "status", "--porcelain"))).lower()
    return found


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


def hardware() -> str:
    """``2 × AMD EPYC`` or ``NVIDIA H100 · 8 × …``, as far as the system tells."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return " · ".join([*gpus, f"{_usable_cores()} × {_processor()}"])


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
