"""How large the pages of memory are that a model's process takes, on Linux: large for weights, small for keys and values.

Each token goes through all weights. In pages of 4 KiB the processor looks up where thousands of them lie, which takes long beside what it
computes with them: in pages of 2 MiB a token of a model with 25 million parameters takes about a fifth less time. glibc asks the system
for them where `GLIBC_TUNABLES` says so when a process starts (`man ld.so`; since glibc 2.35), and gets them where
`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`.

Keys and values have room for the whole context of each row, of which most answers use little; large pages, which NumPy asks for too, would
make nearly all of it resident.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def environment(own: Mapping[str, str] = os.environ) -> dict[str, str]:
    """That of a process that shall have large pages; as it is where the user has decided already, and without effect on other systems."""
    said = own.get(VARIABLE, "")
    if any(part.partition("=")[0] == TUNABLE for part in said.split(":")):
        return dict(own)
    return {**own, VARIABLE: ":".join(filter(None, (said, f"{TUNABLE}=1")))}


def zeros(shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """As `numpy.zeros`, in small pages: what is never touched is never resident.

    Raises:
        MemoryError, OSError: there is not so much memory.
    """
    import numpy as np

    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
