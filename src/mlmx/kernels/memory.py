"""Memory of the process: what is freed is kept for the next step, and what stays is not looked through again."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import threading

# Of malloc.h. Blocks up to the first are taken from the heap, and the heap is given back above the second.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_FROM_HEAP_BYTES = 1 << 30
NEVER = -1
HUGE_BLOCKS = 4  # of almost that size, from the heap's beginning on
_settled, _asked = threading.Event(), threading.Event()


def keep_freed() -> bool:
    """Have the C library keep freed memory instead of giving it back to the system; true where that was possible.

    Tensors of a training step are of tens of megabytes. By default each is mapped anew and returned at once, and
    the system clears every page again before its first use: on the CPU a third of a step and more.
    """
    libc = _libc()
    if libc is None:
        return False
    kept = libc.mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP_BYTES) and libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    if kept and not _asked.is_set():  # not again for every job of a sweep
        _ask_for_huge_pages(libc)
        _asked.set()
    return bool(kept)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Have the heap grow in pages of 2 MB, where the system lends them on request, as most do.

    Every step streams through weights, gradients and moments, a page of 4 kB after the other. The C library would do
    it by itself (``glibc.malloc.hugetlb=1``) if that stood in the environment before Python starts. Only addresses are
    taken up here and given back, no memory; where addresses are rationed, nothing is.
    """
    import resource  # noqa: PLC0415 (not everywhere)

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size, page = LARGEST_FROM_HEAP_BYTES - (1 << 16), mmap.PAGESIZE
    blocks = [address for _ in range(HUGE_BLOCKS) if (address := libc.malloc(size))]
    for address in blocks:
        libc.madvise(-(-address // page) * page, size - page, mmap.MADV_HUGEPAGE)
    for address in reversed(blocks):
        libc.free(address)


def give_back() -> None:
    """Give what the C library has kept back to the system, where memory has run out."""
    gc.collect()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
        _asked.clear()  # what the heap takes up from here on is new


def _libc() -> ctypes.CDLL | None:
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
