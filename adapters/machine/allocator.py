"""Settings of the C library's allocator: keep freed memory, as passes reuse the same large sizes."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h> of glibc


LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's own, read when torch is imported


def leaves_holes(device: str) -> bool:
    """Whether tensors are on a CPU where LARGE_PAGES would place them with fewer holes between them."""
    return device == "cpu" and sys.platform.startswith("linux") and os.environ.get(LARGE_PAGES) != "1"


def release_freed_memory() -> None:
    """Return all unused pages to the system, so that a later peak counts memory in use only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory instead of returning it page by page; False for other C libraries.

    By default every tensor over 32 MiB is mapped again and its pages are cleared one page fault at a
    time, which takes several times as long as the arithmetic of an elementwise operation
    (benchmarks/RESULTS.md). Results are unchanged.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
