"""Memory of the process: what is freed is kept for the next step."""

from __future__ import annotations

import ctypes
import sys

# Of malloc.h. Blocks up to the first are taken from the heap, and the heap is given back above the second.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_FROM_HEAP_BYTES = 1 << 30


def keep_freed() -> bool:
    """Have the C library keep freed memory instead of giving it back to the system; true where that was possible.

    Tensors of a training step are of tens of megabytes. By default each is mapped anew and returned at once, and
    the system clears every page again before its first use: on the CPU a third of a step and more.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
