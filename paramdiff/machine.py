"""What this machine offers to this process."""

from __future__ import annotations

import os
from functools import cache

SHARE = 0.8


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def memory() -> int:
    """Bytes of memory that may be used: four fifths of what there is, or of a container's limit where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, "rb") as file:
                return int(SHARE * min(physical, int(file.read())))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return int(SHARE * physical)
