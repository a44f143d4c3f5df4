"""A sweep on disk: its jobs, and what became of them.

::

    outputs/train/<time>/       sweep.json  plots/  …
    outputs/train/<time>/<n>/   the run of a job
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmx.places import outputs_dir
from mlmx.runs import Run, folders_with

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """The folder of one sweep.

    ``sweep.json``: {"name", "command", "swept": the keys that vary, "status", "started": milliseconds since 1970, …}.
    """

    folder: Path

    def about(self) -> dict[str, Any]:
        """What ``sweep.json`` says; empty where it is torn."""
        try:
            found = json.loads((self.folder / SWEEP_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def runs(self) -> list[Run]:
        """The runs of its jobs that have begun, by number."""
        numbered = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return [
            Run(path) for path in sorted(numbered, key=lambda path: int(path.name)) if (path / "result.json").is_file()
        ]


def all_sweeps() -> list[Sweep]:
    """Every sweep below outputs/train, oldest first."""
    found = [Sweep(folder) for folder in folders_with(SWEEP_FILE, outputs_dir() / "train")]
    return sorted(found, key=lambda sweep: (sweep.about().get("started", 0), str(sweep.folder)))
