"""Where things lie: the shipped configs and the outputs. Imports nothing heavy: ``--help`` needs it."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parents[1] if (PACKAGE.parents[1] / "pyproject.toml").is_file() else None


def conf_dir() -> Path:
    """``conf/`` of a checkout (also when installed editable), else ``mlmx/conf`` of the installed wheel."""
    return CHECKOUT / "conf" if CHECKOUT else PACKAGE / "conf"


def outputs_dir() -> Path:
    """Where all is written, absolute: ``$MLMX_OUTPUTS``, else ``outputs/`` of the checkout or of the working folder."""
    chosen = os.environ.get("MLMX_OUTPUTS")
    return Path(chosen).expanduser().resolve() if chosen else (CHECKOUT or Path.cwd()) / "outputs"


def is_below_outputs(folder: Path) -> bool:
    """Whether a folder lies below `outputs_dir`, links and ``..`` followed."""
    return outputs_dir().resolve() in folder.resolve().parents
