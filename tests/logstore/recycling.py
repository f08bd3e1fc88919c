"""Logs whose last segment is written over an older one: what the tests of room share."""

from __future__ import annotations

import pyarrow as pa
from logstore.support import SEGMENT, entries

from marble.env import Files
from marble.logstore.log import Log, LogOptions
from marble.logstore.segment import segment_numbers
from marble.types import HardState

KIB = 1024
OPTIONS = LogOptions(segment_bytes_max=128 * KIB, cache_bytes_max=0)
SPARE = (SEGMENT(1) + ".tmp").removeprefix("log/")


def read_by_arrow(files: Files, number: int) -> list[int]:
    """The indexes of the entries in a segment, as a tool finds them that knows nothing of marble."""
    table = pa.ipc.open_stream(files.read(SEGMENT(number))).read_all()
    table.validate(full=True)
    return [row["index"] for row in table.to_pylist() if row["kind"] == 3]


def spares(files: Files) -> list[str]:
    return [name for name in files.list("log") if name.endswith(".tmp")]


def write_segments(log: Log, first: int, segments: int, size: int = 50 * KIB) -> int:
    """Entries from `first` on, two in each segment, each in a sync of its own. Returns what comes next."""
    for index in range(first, first + 2 * segments):
        log.append(1, HardState(1, 1, index - 1), entries(index, [1], size=size))
        log.sync()
    return first + 2 * segments


def recycled(files: Files) -> tuple[Log, int]:
    """A log whose last segment is written over an older one, and the index that comes next."""
    log = Log.open(files, OPTIONS)
    following = write_segments(log, 1, 3)
    log.start_after(1, 2, 1)
    log.sync()
    assert log.purge() > 0
    assert spares(files) == [SPARE]
    log.append(1, None, entries(following, [1], size=50 * KIB))
    log.sync()
    assert spares(files) == []
    assert segment_numbers(files) == [2, 3, 4]
    return log, following + 1
