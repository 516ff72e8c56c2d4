"""How much memory this process may still take: what the system has free, or what its control group leaves it.

Linux says it in /proc and /sys; elsewhere psutil is asked, where it is installed. None means that nobody knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available(system: Path = Path("/")) -> int | None:
    """Bytes that may still be taken before something is killed or swapped.

    Args:
        system: where proc and sys are found; for tests.
    """
    free = _meminfo(system)
    if free is None:
        try:
            import psutil

            free = int(psutil.virtual_memory().available)
        except ImportError:
            return None
    return min([free, *_left_in_groups(system)])


def resident() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _meminfo(system: Path) -> int | None:
    try:
        for line in (system / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _left_in_groups(system: Path) -> Iterator[int]:
    """What each control group above this process leaves, versions 1 and 2. File cache that can be dropped is free."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _number, controllers, name = line.split(":", 2)
        if controllers == "":
            base, limit, used, cache = system / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, cache = system / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = Path(name.lstrip("/"))
        for group in (inside, *inside.parents):
            most, now = _number_in(base / group / limit), _number_in(base / group / used)
            if most is not None and now is not None:
                yield max(0, most - max(0, now - _statistic(base / group / "memory.stat", cache)))


def _number_in(path: Path) -> int | None:
    """The number in a file; None where there is none, or no limit (`max`)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0
