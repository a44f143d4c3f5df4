"""What the machine did while a run trained: processor, memory and GPUs, sampled for MLflow's page of system metrics.

They go to MLflow alone: they are no numbers of the run, and metrics.jsonl has none of them.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from mlmx.runs.records import milliseconds

EVERY_SECONDS = 10.0
Sample = tuple[int, int, dict[str, float]]  # step, milliseconds since 1970, values by MLflow's names for them


class SystemMetrics:
    """Samples in a thread of its own until ``ended`` is set; whoever sends them takes them from ``waiting``.

    A sample's step is how many times ten seconds it came after ``started``, the run's, in milliseconds since 1970, so
    that a run that is resumed goes on counting. ``sampled`` is called after each.
    """

    def __init__(self, started: int, sampled: Callable[[], None]) -> None:
        self.started, self.sampled = started, sampled
        self.waiting: deque[Sample] = deque(maxlen=8640)  # a day, if MLflow is away; then the oldest are dropped
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(Exception):  # a device that is lost, say; the next sample may be one again
                values, now = sample(), milliseconds()
                self.waiting.append((max(0, now - self.started) // int(EVERY_SECONDS * 1000), now, values))
                self.sampled()
            self.ended.wait(EVERY_SECONDS)


def sample() -> dict[str, float]:
    """The machine now; the processor since the last time.

    Of each GPU what NVIDIA's library says, if a package that speaks to it (nvidia-ml-py) is there; else its memory.
    """
    import psutil  # noqa: PLC0415 (a refused configuration does not load it)

    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    try:
        import pynvml  # noqa: PLC0415 (which few have)
    except ImportError:
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            for number in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(number)
                found[f"gpu_{number}_memory_usage_megabytes"] = (total - free) / 1e6
                found[f"gpu_{number}_memory_usage_percentage"] = 100 * (total - free) / total
        return found
    library: Any = pynvml
    with contextlib.suppress(library.NVMLError):
        library.nvmlInit()  # counted: once more costs nothing
        for number in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(number)
            memory, rates = library.nvmlDeviceGetMemoryInfo(handle), library.nvmlDeviceGetUtilizationRates(handle)
            found[f"gpu_{number}_utilization_percentage"] = float(rates.gpu)
            found[f"gpu_{number}_memory_usage_megabytes"] = memory.used / 1e6
            found[f"gpu_{number}_memory_usage_percentage"] = 100 * memory.used / memory.total
    return found
