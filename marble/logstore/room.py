"""Room behind the log's end: blocks that a segment has before anything is written into them.

A sync of a file that grows waits for the journal of the file system, which has to note new blocks and a new length. Over
blocks that are there already it waits for the data alone.

Rule 1: only the last segment has room. It is cut off when the next one is started, when the log is closed, and by a start,
        so that no frame that was torn, or cut, can ever stand behind a frame that is written later.
Rule 2: what stands in the room is zeros or comes from a segment of a lower number, whose seals name that number. So none
        of it can be taken for a frame of the log.
Rule 3: every write into room, or with room behind it, ends with at least `TERMINATOR_BYTES` zeros, in the same write. They
        tell whoever reads the segment as an Arrow stream that it ends, and a start that nothing was torn.
Rule 4: a file is written over only when the directory was synced without its old name, and when it has no other one.
Rule 5: room is a convenience: where the disk is full, or there is no spare, the segment grows.
"""

from __future__ import annotations

import threading
from typing import Final

from marble.env import AppendFile, Files
from marble.logstore.segment import DIRECTORY, TEMPORARY_SUFFIX, segment_path

TERMINATOR_BYTES: Final = 64
"""As long as everything in a segment is aligned. Arrow's readers take four zeros for the end of a stream."""

SPARES_MAX: Final = 4
"""Purged segments that are kept to be written over: as many as a snapshot usually frees at once."""

REST_S: Final = 1.0
REST_BYTES: Final = 1024 * 1024
"""Who writes less than this in `REST_S` does well without spares, unless somebody says otherwise."""

_PAGE_BYTES: Final = 4096
_FRAME_BYTES_MAX: Final = 32 * 1024
"""Behind a longer frame no zeros are written ahead: writing everything twice costs more than the journal does."""
_AHEAD_BYTES_MIN: Final = 16 * 1024
_AHEAD_BYTES_MAX: Final = 256 * 1024


def zeros_behind(end: int, room: int, nbytes: int, segment_bytes_max: int) -> int:
    """How many zeros are to be written behind a frame of `nbytes` at `end` of a segment that has `room`.

    Room that is made doubles the segment, within limits, so that a log of a few entries is a small file.
    """
    after = end + nbytes
    # Up to the end of a page: the page that the next write begins in need not be read before it is written.
    terminator = TERMINATOR_BYTES + -(after + TERMINATOR_BYTES) % _PAGE_BYTES
    if nbytes + terminator <= room:
        return terminator
    if nbytes > _FRAME_BYTES_MAX:
        return 0
    ahead = min(max(after, _AHEAD_BYTES_MIN), _AHEAD_BYTES_MAX, segment_bytes_max - after)
    return ahead if ahead >= TERMINATOR_BYTES else 0


class Room:
    """How much is written ahead, and the spares: files that were segments and may be written over. Thread-safe.

    Spares are kept while the log is written to, so that they take no space beside one that has come to rest. They are of no
    use to a later start, which removes them if `drop` has not.

    Parameters
    ----------
    files
        The node's.
    segment_bytes_max
        Files that are much smaller, or larger, are not kept.
    rest_bytes
        The log rests when less than this was written in `REST_S`.
    """

    def __init__(self, files: Files, segment_bytes_max: int, rest_bytes: int = REST_BYTES) -> None:
        self._files = files
        self._segment_bytes_max = segment_bytes_max
        self._rest_bytes = rest_bytes
        self._lock = threading.Lock()
        self._paths: list[str] = []
        self._written = 0
        self._looked_at = 0.0
        self._written_then = 0
        self._resting = False

    def behind(self, end: int, room: int, nbytes: int) -> int:
        """Note that a frame is written; see `zeros_behind`. By one thread at a time."""
        self._written += nbytes
        return zeros_behind(end, room, nbytes, self._segment_bytes_max)

    def rests(self, now: float) -> bool:
        """Say what time it is, in seconds. Always the same thread.

        Returns whether little has been written since the last look, so that the spares are to go: with the next `tidy`.
        """
        if now - self._looked_at < REST_S:
            return False
        written = self._written - self._written_then
        self._looked_at, self._written_then = now, self._written_then + written
        with self._lock:
            self._resting = written < self._rest_bytes
            return self._resting and bool(self._paths)

    def tidy(self) -> None:
        """Remove the spares if the log rests. Raises OSError."""
        if self._resting:
            self.drop()

    def retire(self, segment: int, nbytes: int) -> None:
        """Take away the name of `segment`, durably. Raises OSError."""
        path = segment_path(segment)
        spare = path + TEMPORARY_SUFFIX
        with self._lock:
            fits = self._segment_bytes_max // 2 <= nbytes <= self._segment_bytes_max
            wanted = fits and not self._resting and len(self._paths) < SPARES_MAX
        kept = wanted and self._files.set_aside(path, spare)
        if not kept:
            self._files.remove(path)
        self._files.sync_directory(DIRECTORY)
        if kept:
            with self._lock:
                self._paths.append(spare)

    def take(self, path: str) -> tuple[AppendFile, str]:
        """A file that is to become `path`, and the name that it has until then: a spare one, or a new one of that name."""
        with self._lock:
            spare = self._paths.pop() if self._paths else None
        if spare is None:
            return self._files.create(path), path
        return self._files.reuse(spare), spare

    def drop(self) -> None:
        """Remove what is kept. Raises OSError."""
        with self._lock:
            paths, self._paths = self._paths, []
        for path in paths:
            self._files.remove(path)
