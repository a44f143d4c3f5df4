"""A package with functions of its own, as pip would install it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

MODULE = "mlmx_test_plugin"


def install(
    site: Path, code: str, points: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, module: str = MODULE
) -> None:
    """A distribution of one module.

    Args:
        points: entry points, ``{"masking.every_other": "every_other"}``.
    """
    info = site / f"{module}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    lines = [f"{name} = {module}:{function}" for name, function in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[mlmx.plugins]", *lines, ""]))
    (site / f"{module}.py").write_text(f"from __future__ import annotations\nimport numpy as np\n{code}")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, module, raising=False)
