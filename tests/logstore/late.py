"""Logs that begin late: what the tests of snapshots in the log share."""

from __future__ import annotations

from logstore.model import Group, group_contents
from logstore.support import disk, entries

from marble.logstore.log import Log, LogOptions
from marble.testing.disk import SimulatedFiles
from marble.types import HardState

THREES = LogOptions(segment_bytes_max=14_000, cache_bytes_max=4096)
"""Three entries of `filled` go into each segment."""

UNCACHED = LogOptions(segment_bytes_max=14_000, cache_bytes_max=0)


def filled(count: int = 10, options: LogOptions = THREES) -> tuple[SimulatedFiles, Log]:
    """A log whose segments have a few large entries each; group 2 has a vote and no entry."""
    files = disk()
    log = Log.open(files, options)
    log.append(2, HardState(7, 3, 0), None)
    for first in range(1, count + 1):
        log.append(1, HardState(1, 1, first - 1), entries(first, [1], size=2000))
        log.sync()
    return files, log


def groups_of(files: SimulatedFiles, *, writable: bool = False) -> dict[int, Group]:
    log = Log.open(files, THREES, writable)
    try:
        return group_contents(log)
    finally:
        log.close()
