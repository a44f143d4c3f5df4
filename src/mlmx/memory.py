"""Memory of the process: what is freed is kept for the next step, and what stays is not looked through again."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from typing import Any

# Of malloc.h. Blocks up to the first are taken from the heap, and the heap is given back above the second.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_FROM_HEAP_BYTES = 1 << 30
_settled = threading.Event()


def keep_freed() -> bool:
    """Have the C library keep freed memory instead of giving it back to the system; true where that was possible.

    Tensors of a training step are of tens of megabytes. By default each is mapped anew and returned at once, and
    the system clears every page again before its first use: on the CPU a third of a step and more.
    """
    libc = _libc()
    if libc is None:
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP_BYTES)) and bool(
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )


def give_back() -> None:
    """Give what the C library has kept back to the system, where memory has run out."""
    gc.collect()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _libc() -> Any:
    """glibc, or None where there is another C library."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")) else None


def settle() -> None:
    """Take what is alive now out of Python's garbage collection, for which it is a million objects of libraries.

    The Trainer starts with a full collection: three quarters of a second for every job of a sweep.
    """
    if _settled.is_set():  # gc.get_freeze_count() would tell as well, by counting the million
        gc.collect()  # what an earlier job left behind would stay for good
    gc.freeze()
    _settled.set()
