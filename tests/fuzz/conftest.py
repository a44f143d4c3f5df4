"""Fuzzing repeats itself: the same draws on every machine, whatever else was imported before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis.internal.constants_ast import Constants


@pytest.fixture(scope="session", autouse=True)
def _no_constants_of_loaded_modules() -> Iterator[None]:
    """hypothesis tries constants of whatever local module is loaded, so that another test could change the draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypothesis.internal.conjecture.providers._get_local_constants", Constants)
        yield
