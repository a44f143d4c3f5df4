"""What the real commands and servers share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import Server, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, _store: Path) -> Iterator[Server]:
    """An MLflow server for the tests of a file."""
    with serving(tmp_path_factory.mktemp("server"), _store) as running:
        yield running
