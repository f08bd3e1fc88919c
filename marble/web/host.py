"""What the machine says of this process and of the disk below a node: Linux's ``/proc``, and nothing that could hang on a network."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from marble.web.health import Disk


@dataclass(frozen=True, slots=True)
class Process:
    """This process. 0 where the machine does not say."""

    threads: int
    open_fds: int
    resident_bytes: int
    cpu_seconds: float


def look_at_process() -> Process:
    """This process as it is now."""
    return Process(_threads(), _open_fds(), _resident_bytes(), sum(os.times()[:2]))


def look_at_disk(directory: str | os.PathLike[str]) -> Disk | None:
    """The file system below `directory`; None if it cannot be asked."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    return Disk(
        free_bytes=found.f_bavail * found.f_frsize,
        size_bytes=found.f_blocks * found.f_frsize,
        read_only=bool(found.f_flag & os.ST_RDONLY),
    )


def _threads() -> int:
    # Those of gRPC are no threads of Python.
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def _open_fds() -> int:
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # Without that of the listing.
    except OSError:
        return 0


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
