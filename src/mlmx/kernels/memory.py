"""Memory: what is freed is kept for the next step, what stays is not looked through again, and where it runs out."""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlmx.config.errors import WorkError

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
# Of malloc.h. Blocks up to the first are taken from the heap, and the heap is given back above the second.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, NEVER = -1, -3, -1
LARGEST_FROM_HEAP_BYTES = 1 << 30
HUGE_BLOCKS = 4  # of almost that size, from the heap's beginning on
# How libraries say that memory ran out; oneDNN says no more than the last when its scratch memory is refused.
SIGNS = (
    *("DefaultCPUAllocator", "can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED"),
    "could not create a primitive",
)
_settled, _asked = threading.Event(), threading.Event()


def keep_freed() -> bool:
    """Have the C library keep freed memory instead of giving it back to the system; true where that was possible.

    Tensors of a training step are of tens of megabytes. By default each is mapped anew and returned at once, and
    the system clears every page again before its first use: on the CPU a third of a step and more.
    """
    libc = _libc()
    settings = (M_MMAP_THRESHOLD, LARGEST_FROM_HEAP_BYTES), (M_TRIM_THRESHOLD, NEVER)
    if libc is None or not all(libc.mallopt(*setting) for setting in settings):
        return False
    import resource  # noqa: PLC0415 (not everywhere)

    # Every step streams through weights, gradients and moments, a page of 4 kB after the other. So have the heap grow
    # in pages of 2 MB, where the system lends them on request, as most do. The C library would do it by itself
    # (``glibc.malloc.hugetlb=1``) if that stood in the environment before Python starts. Only addresses are taken up
    # here and given back, no memory; where addresses are rationed, nothing is. Not again for every job of a sweep.
    if not _asked.is_set() and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        size, page = LARGEST_FROM_HEAP_BYTES - (1 << 16), mmap.PAGESIZE
        blocks = [address for _ in range(HUGE_BLOCKS) if (address := libc.malloc(size))]
        for address in blocks:
            libc.madvise(-(-address // page) * page, size - page, mmap.MADV_HUGEPAGE)
        for address in reversed(blocks):
            libc.free(address)
    _asked.set()
    return True


def _libc() -> ctypes.CDLL | None:
    """glibc, or None where there is another C library."""
    try:
        libc = ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
    except OSError:
        return None
    return libc if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")) else None


def settle() -> None:
    """Take what is alive now, a million objects of libraries, out of Python's garbage collection.

    The Trainer starts with a full one: three quarters of a second for every job of a sweep.
    """
    if _settled.is_set():  # gc.get_freeze_count() would tell as well, by counting the million
        gc.collect()  # what an earlier job left behind would stay for good
    gc.freeze()
    _settled.set()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of the machine did not suffice."""
    import torch  # noqa: PLC0415 (slow; memory is set up before it)

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = any(sign in str(error) for sign in SIGNS)
    return isinstance(error, RuntimeError) and not isinstance(error, WorkError) and said


def brief(error: BaseException) -> str:
    """The first sentence of an error's message that says something, or its name.

    >>> brief(RuntimeError("[enforce fail at alloc_cpu.cpp] err == 0. DefaultCPUAllocator: can't allocate memory: …"))
    "DefaultCPUAllocator: can't allocate memory: …"
    >>> brief(MemoryError())
    'MemoryError'
    """
    said = re.sub(r"^\[enforce fail[^]]*\][^.]*\. ", "", str(error).strip())
    return said.split("\n")[0].split(". ")[0][:200] or type(error).__name__


def release() -> None:
    """Free what nothing refers to any more, and give kept blocks back, none of which was large enough."""
    import torch  # noqa: PLC0415 (as above)

    gc.collect()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
        _asked.clear()  # what the heap takes up from here on is new
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def parts(inputs: Batch, rows: int) -> Iterator[Batch]:
    """A batch in parts of so many rows, in order, the last of which may be smaller."""
    for first in range(0, len(inputs["input_ids"]), rows):
        yield {name: value[first : first + rows] for name, value in inputs.items()}
