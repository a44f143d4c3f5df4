"""Telling that memory ran out, and what is done then: give back what can be, and cut a batch into parts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from mlmx.config.errors import WorkError
from mlmx.kernels import memory

Batch = dict[str, torch.Tensor]
SIGNS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
    "could not create a primitive",  # oneDNN says no more when its scratch memory is refused
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of the machine did not suffice."""
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
    memory.give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def parts(inputs: Batch, rows: int) -> Iterator[Batch]:
    """A batch in parts of so many rows, in order; the last part may be smaller.

    ``{name: [B, …]}`` → ``{name: [rows, …]}``, …
    """
    for first in range(0, len(inputs["input_ids"]), rows):
        yield {name: value[first : first + rows] for name, value in inputs.items()}
