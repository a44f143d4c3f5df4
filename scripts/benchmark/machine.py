"""The machine that a run was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "mlflow", "numpy")
# Those that decide how fast matrix products are, in which precision.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve")


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, flags and versions; nothing of who or where."""
    info = cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "processor": info.get("model name", platform.processor() or platform.machine()),
        "usable cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory in GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "flags": [flag for flag in FLAGS if flag in flags],
        "load before the run": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, where there is one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if path.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def commit() -> str | None:
    """The commit of this checkout, with ``+`` where files were changed since."""
    here = str(Path(__file__).parent)
    try:
        found = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
