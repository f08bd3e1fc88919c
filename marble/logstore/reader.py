"""Reading entries back from the segments of a log that is open.

Rule 1: what is read is verified as at a start: the disk may have changed its mind since.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from marble._core import frame
from marble.env import Files
from marble.errors import CorruptionError, InvariantError, check
from marble.logstore.extents import Place
from marble.logstore.segment import WINDOW_BYTES, Window, segment_path

_WINDOW_BYTES_MIN: Final = 256 * 1024


class Reader:
    """Reads places of one group, mostly one behind the other. For one thread, and for the length of one read.

    Parameters
    ----------
    files
        The node's files.
    group
        Number of the Raft group.
    bytes_max
        How many bytes will be wanted in all: bounds what is read ahead.
    """

    def __init__(self, files: Files, group: int, bytes_max: int) -> None:
        self._files = files
        self._group = group
        self._window_bytes = min(max(bytes_max, _WINDOW_BYTES_MIN), WINDOW_BYTES)
        self._segment = 0
        self._window: Window | None = None

    def load(self, place: Place) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """The entries at `place`, and all rows of the frame in which they are.

        Raises
        ------
        CorruptionError
            There is something else.
        OSError
            The disk failed, or the segment is gone.
        """
        path = segment_path(place.segment)
        where = self._files.describe(path)
        window = self._window
        if window is None or self._segment != place.segment:
            window = self._look(path, place.segment)
        seal = window.find_frame(place.segment, place.offset, place.length)
        if seal is None:
            # What was read ahead may be older than the frame.
            window = self._look(path, place.segment)
            seal = window.find_frame(place.segment, place.offset, place.length)
        if seal is None or seal.length != place.length:
            raise CorruptionError("the log was damaged after it had been opened", where, place.offset)
        data, at = window.view(place.offset, place.length)
        try:
            batch = frame.decode(data, at, seal)
            rows = batch.slice(place.row, place.end - place.first)
            check(frame.check_entries(rows, self._group)[0] == place.first, "entries of other indexes")
            check(rows.num_rows == place.end - place.first, "fewer entries")
        except (CorruptionError, InvariantError) as error:
            what = f"a frame does not hold the entries that it had held ({error})"
            raise CorruptionError(what, where, place.offset) from None
        return rows, batch

    def _look(self, path: str, segment: int) -> Window:
        self._window = Window(self._files, path, self._files.size(path), self._window_bytes)
        self._segment = segment
        return self._window
