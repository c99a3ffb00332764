"""Where a host's large tensors get their memory from.

The C library maps tensors of 16 or 32 MB anew at some times and uses freed memory again at others, as its
dynamic threshold has it. Mapped anew, each page of 4 KiB costs a fault when it is first written, and the
same output layer takes 72 or 55 ms. Where all of them use freed memory again (no `mmap`), times are steady,
but the heap of a rank grows to more than twice what it needs (seen with glibc 2.36).

With huge pages neither is needed: large tensors are always mapped, a fault brings 2 MiB, and memory goes back
at once when a tensor dies.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

HUGE_PAGE_BYTES = 2 << 20
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TORCH = "THP_MEM_ALLOC_ENABLE"
"""Lets torch ask for huge pages for tensors from this size on; read at the first tensor of a process."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
_TRIM_BYTES = 64 << 20
"""Freed memory up to this stays in the heap: what glibc comes to by itself where no threshold is set."""


def use_huge_pages() -> bool:
    """Map tensors of 2 MiB and more by huge pages. Call before the first tensor is made.

    Returns whether it is so. Nothing changes where the system has no such pages or forbids them, where the C
    library has no `mallopt` (macOS, musl), where THP_MEM_ALLOC_ENABLE=0 says so, and where torch has made
    tensors already.
    """
    if not _allowed():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    os.environ.setdefault(_TORCH, "1")
    # Only those that torch asks huge pages for have such addresses.
    aligned = torch.empty(HUGE_PAGE_BYTES, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES == 0
    if not aligned:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, HUGE_PAGE_BYTES) and mallopt(_TRIM_THRESHOLD, _TRIM_BYTES))


def _allowed() -> bool:
    try:
        return "[never]" not in _SWITCH.read_text()
    except OSError:
        return False
