"""The C library's allocator, told to keep what is freed: passes make the same large tensors again."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h> of glibc


def hand_back_freed_memory() -> None:
    """Give the system all pages that hold nothing, so that a peak from here on is of what is held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def keep_freed_memory() -> bool:
    """Have glibc reuse freed memory instead of handing it back page by page; False where it is another.

    By default every tensor over 32 MiB is mapped anew and its pages are cleared one fault at a time,
    which takes several times as long as the arithmetic of an elementwise operation
    (benchmarks/RESULTS.md). Numbers are the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
