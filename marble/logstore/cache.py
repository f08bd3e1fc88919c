"""Frames kept in memory after they were written or read.

Rule 1: what is here is what is on the disk; forgetting any of it costs a read and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict

import pyarrow as pa


class FrameCache:
    """The frames that were used last, up to a limit in bytes. Not thread-safe: the Log's lock guards it.

    - ``nbytes <= bytes_max``, and it is the sum of the frames' lengths.

    Parameters
    ----------
    bytes_max
        A longer frame is not kept at all.
    """

    def __init__(self, bytes_max: int) -> None:
        self.nbytes = 0
        self._bytes_max = bytes_max
        self._frames: OrderedDict[tuple[int, int], tuple[pa.RecordBatch, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._frames)

    def recall(self, segment: int, offset: int) -> pa.RecordBatch | None:
        """The rows of the frame at `offset` of `segment`, if they are still here."""
        found = self._frames.get((segment, offset))
        if found is None:
            return None
        self._frames.move_to_end((segment, offset))
        return found[0]

    def remember(self, segment: int, offset: int, batch: pa.RecordBatch, length: int) -> None:
        """Keep the rows of a frame of `length` bytes, in place of those that were not used for longest."""
        if length > self._bytes_max or (segment, offset) in self._frames:
            return
        self._frames[segment, offset] = batch, length
        self.nbytes += length
        while self.nbytes > self._bytes_max:
            self.nbytes -= self._frames.popitem(last=False)[1][1]

    def forget(self, segment: int) -> None:
        """Drop all frames of `segment`, which is gone."""
        for place in [place for place in self._frames if place[0] == segment]:
            self.nbytes -= self._frames.pop(place)[1]
