"""Waiting threads: awake for a moment on cores of one's own, asleep on shared ones, and as the environment says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlmx.kernels import threads
from mlmx.kernels.threads import SPINS, Neighbours, choose_waiting

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine with four cores, two of them this process's, whose counts and clocks the test moves."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    clocks = {"wall": 100.0, "own": 5.0}
    counts = tmp_path / "stat"
    monkeypatch.setattr(threads, "COUNTS", counts)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    monkeypatch.setattr("time.monotonic", lambda: clocks["wall"])
    monkeypatch.setattr("time.process_time", lambda: clocks["own"])

    def move(busy: float, own: float = 0.0, wall: float = 0.0) -> None:
        clocks["wall"] += wall
        clocks["own"] += own
        half = int(busy * 50)
        rows = [f"cpu{core} {half} 0 0 7000 9 0 0 0 3 3" for core in (0, 1)]
        others = [f"cpu{core} {int(clocks['wall'] * 100)} 0 0 0 0 0 0 0 0 0" for core in (2, 3)]
        counts.write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *rows, *others, "intr 5", ""]), encoding="ascii")

    move(busy=20.0)
    return move


def chosen() -> list[str | None]:
    return [os.environ.get(name) for name in NAMES]


def test_what_others_use_of_one_s_own_cores_counts(machine):
    neighbours = Neighbours()
    machine(busy=21.5, own=1.0, wall=1.0)  # 1.5 s of two cores' second, 1.0 of them this process's
    assert neighbours.share() == pytest.approx(0.25)


@pytest.mark.parametrize(("busy", "spins"), [(20.5, SPINS), (20.6, SPINS), (20.9, None), (22.0, None)])
def test_threads_stay_awake_where_nothing_else_is_at_work(machine, busy: float, spins: str | None):
    neighbours = Neighbours()
    machine(busy, own=0.5, wall=1.0)
    choose_waiting(neighbours)
    assert chosen() == ["PASSIVE", spins]


def test_they_sleep_where_it_is_not_known(machine, monkeypatch: pytest.MonkeyPatch):
    neighbours = Neighbours()
    machine(busy=20.0, wall=0.1)  # too short to tell
    assert neighbours.share() == 1
    monkeypatch.setattr(threads, "COUNTS", Path("/nowhere"))
    machine(busy=20.0, wall=1.0)
    assert neighbours.share() == 1
    assert Neighbours().share() == 1
    choose_waiting(neighbours)
    assert chosen() == ["PASSIVE", None]


def test_they_sleep_where_jobs_share_the_cores(machine):
    neighbours = Neighbours()
    machine(busy=20.0, wall=1.0)
    choose_waiting(neighbours, alone=False)
    assert chosen() == ["PASSIVE", None]


@pytest.mark.parametrize(
    "given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}, {"GOMP_SPINCOUNT": "7"}]
)
def test_the_environment_has_the_last_word(machine, given: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    neighbours = Neighbours()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    machine(busy=20.0, wall=1.0)
    choose_waiting(neighbours)
    assert {name: os.environ[name] for name in given} == given
    assert "GOMP_SPINCOUNT" in given or ("OMP_WAIT_POLICY" in given and "GOMP_SPINCOUNT" not in os.environ)
