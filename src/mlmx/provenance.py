"""Where a run comes from: commit, command, machine."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "hydra-core", "mlflow")


def tags() -> dict[str, str]:
    """Tags of an MLflow run that say how to make it again."""
    import mlmx

    found = {
        "mlmx.version": mlmx.__version__,
        "mlmx.host": socket.gethostname(),
        "mlmx.hardware": hardware(),
        "mlmx.python": platform.python_version(),
        "mlmx.packages": " ".join(f"{name}=={version(name)}" for name in PACKAGES),
        "mlflow.source.name": "mlmx",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown",
    }
    # The commit of the code in use; an installed wheel has none.
    checkout = Path(__file__).resolve().parents[2]
    commit = _git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else None
    if commit:
        found["mlflow.source.git.commit"] = commit
        found["mlmx.git_dirty"] = str(bool(_git(checkout, "status", "--porcelain"))).lower()
    return found


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
