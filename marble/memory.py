"""Memory that was freed: glibc keeps some of it for what comes next, and gives the rest back when the process rests.

gRPC takes a block of glibc's for each large message and frees it soon after. glibc gives such a block back to the kernel at once, and
takes the next one anew: a page fault for every 4 KiB, which costs a receiver of 1 MiB messages up to half of its processor time. On the
other hand it keeps what lies free between blocks that live, hundreds of MiB after a bulk load, for as long as the process runs.

Rule 1: how a process handles its memory is its owner's affair. ``marble serve`` calls this for its own process; a program that embeds a
node is changed only if it asks, and whoever has set glibc's tunables by the environment has decided already.
Rule 2: nothing here is needed for anything to be right. Where the C library is another one, nothing is done.

::

    keep_freed_memory()              # once, before what moves much: a node, a transport
    give_back_freed_memory()         # when little is going on
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Final

import pyarrow as pa

BLOCK_BYTES_MAX: Final = 8 << 20
"""Larger blocks go back to the kernel when they are freed. The largest that come with every message are gRPC's, of 4 MiB at most."""
KEPT_BYTES_MAX: Final = 64 << 20
"""What glibc keeps at the end of each of its arenas, of which threads that run at the same time have one each."""

REST_WINDOW_S: Final = 5.0
"""A process is looked at for so long each time."""
REST_SHARE: Final = 0.2
"""One that has used less than this share of one processor rests: what it then faults in again costs nothing that matters."""
WORK_S: Final = 2.0
"""Processor time after which there may be something to give back. A burst of less is given back when the process's own ticks have
added up to it, in minutes.
"""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_VARIABLES: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_TUNABLES: Final = tuple(f"glibc.malloc.{name}" for name in ("trim_threshold", "mmap_threshold", "top_pad", "mmap_max"))


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 8 MiB, up to 64 MiB of them in each arena of glibc's, in place of giving each back.

    It holds for the whole process from now on. Call `give_back_freed_memory`, or a `Housekeeper`, now and then, when it rests.

    Returns
    -------
    bool
        Whether it does. Not so if the C library is not glibc, or the environment sets glibc's thresholds
        (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TOP_PAD_``, ``MALLOC_MMAP_MAX_``, or the same in
        ``GLIBC_TUNABLES``).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name in os.environ for name in _VARIABLES) or any(name in tunables for name in _TUNABLES)
    library = None if chosen else _glibc()
    if library is None:
        return False
    return bool(
        library.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES_MAX) and library.mallopt(_M_MMAP_THRESHOLD, BLOCK_BYTES_MAX)
    )


def give_back_freed_memory() -> None:
    """Give the kernel what was freed and is kept: glibc's free blocks, also those between blocks that live, and Arrow's unused ones.

    Other threads that want memory from the same arena wait meanwhile. The GIL is not held.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
    pa.default_memory_pool().release_unused()


class Housekeeper:
    """Gives freed memory back when a process rests after it has worked. One thread uses it.

    Parameters
    ----------
    monotonic, spent
        The time, and the processor time of this process, both in seconds (`time.monotonic`, `time.process_time`).
    give_back
        What is called then.
    """

    def __init__(
        self,
        monotonic: Callable[[], float],
        spent: Callable[[], float],
        give_back: Callable[[], None] = give_back_freed_memory,
    ) -> None:
        self._monotonic, self._spent, self._give_back = monotonic, spent, give_back
        self._at, self._spent_s = monotonic(), spent()
        self._given_s = 0.0
        """Processor time when memory was last given back. A start is work, too."""

    def look(self) -> bool:
        """Call this again and again; whether memory was given back."""
        now = self._monotonic()
        lasted_s = now - self._at
        if lasted_s < REST_WINDOW_S:
            return False
        spent_s = self._spent()
        rests = spent_s - self._spent_s < REST_SHARE * lasted_s
        due = rests and spent_s - self._given_s >= WORK_S
        if due:
            self._give_back()
        # What giving back has cost is no work.
        self._at, self._spent_s = self._monotonic(), self._spent()
        if due:
            self._given_s = self._spent_s
        return due


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    library = ctypes.CDLL(None)
    return (
        library if all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
    )
