"""What the C library does with memory that is freed: glibc's two thresholds, for as long as weights are read, and its heap.

glibc gives large pieces pages of their own, which the system has back at once, and cuts small ones out of a heap that hardly
shrinks. What is large it learns from what is freed (`man 3 mallopt`, M_MMAP_THRESHOLD), so that after a few matrices even
32 MB are cut out of the heap. Where short-lived matrices alternate with lasting small ones, as when weights are quantised,
what it holds after that is chance: beside 68 MB in use, 10 to 170 MB more (seen with a model of 200 MB in float32). And what a model
leaves when it goes does not take the next one in: after a low-rank training of 360 M parameters 1.9 GB stayed, and the base that
was read again came on top.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

from slmops.train.memory import MAPPED

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of glibc's thresholds (malloc.h): free bytes on top of the heap that are kept; bytes that get pages of their own."""

AT_START = 128 << 10
"""glibc's own first value of both."""


def _set(trim: int, mapped: int) -> None:
    """Set both thresholds, in bytes; does nothing where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(TRIM_THRESHOLD, trim)
        library.mallopt(MMAP_THRESHOLD, mapped)


def give_back() -> None:
    """Whatever is free in the heap is the system's again, pages between pieces in use included (`malloc_trim`)."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Memory that is freed inside is the system's again at once, down to pieces of 128 KiB.

    After it stands what glibc would have learned at most: 32 MB, and twice as much on top of the heap. It learns no more.
    """
    _set(AT_START, AT_START)
    try:
        yield
    finally:
        _set(2 * MAPPED, MAPPED)
