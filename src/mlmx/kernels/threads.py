"""How torch's threads wait for each other: awake for a moment where the cores are this process's alone, else asleep.

A thread that sleeps at once is woken at every operation, which costs small models a fifth of a step. One that stays
awake takes its core from whatever shares it, and all threads then wait for that one: several times slower.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

SPINS = "100000"  # pauses of a waiting thread before it sleeps (GNU OpenMP's): one to five milliseconds
SHARED = 0.1  # of the cores, from which on others are at work on them
LEAST_SECONDS = 0.2  # of looking; the system counts in hundredths
COUNTS = Path("/proc/stat")


class Neighbours:
    """What other processes use of the cores that this one may run on, from here on."""

    def __init__(self) -> None:
        self.began = time.monotonic(), _others()

    def share(self) -> float:
        """Of the cores' time; 1 where it is not known."""
        since, before = self.began
        seconds, now = time.monotonic() - since, _others()
        if before is None or now is None or seconds < LEAST_SECONDS:
            return 1.0
        used = (now - before) / (seconds * len(os.sched_getaffinity(0)))
        return min(max(used, 0.0), 1.0)


def choose_waiting(neighbours: Neighbours, alone: bool = True) -> None:
    """Set how threads wait, before torch is loaded; ``alone``: no other process of this run will want the cores."""
    set_waiting(awake=alone and neighbours.share() < SHARED)


def set_waiting(awake: bool) -> None:
    """Tell GNU OpenMP, which reads it when torch is loaded; what the environment says already stays."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if awake:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _others() -> float | None:
    """Seconds that all others have used of this process's cores since the start of the machine."""
    try:
        lines = COUNTS.read_text(encoding="ascii").splitlines()
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):  # no Linux
        return None
    counts = [[int(count) for count in line.split()[1:9]] for line in lines if line.split(" ")[0] in mine]
    idle, waiting = 3, 4  # user, nice, system, idle, iowait, irq, softirq, steal
    busy = sum(sum(row) - row[idle] - row[waiting] for row in counts) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time() if counts else None
