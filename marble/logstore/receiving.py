"""A file on its way in from a peer, piece by piece: what snapshots and the files that they refer to have in common.

Rule 1: ``offset`` says what is written and synced, and nothing beyond it counts. Who made the file verifies the whole.
"""

from __future__ import annotations

from typing import Protocol

from marble.env import AppendFile
from marble.errors import ProtocolError, check
from marble.writing import write_paced


class Hash(Protocol):
    """A running checksum (`marble._core.checksum`)."""

    def update(self, data: memoryview) -> None: ...


class PartialFile:
    """The bytes that have arrived. One thread.

    - The bytes below ``offset`` are written and synced.
    - After an OSError or `close` it is of no use.

    Parameters
    ----------
    path, file
        Where they go; `file` has those that were there before.
    total
        Takes in every byte, and has taken in those that were there before.
    nbytes
        How many there are to be.
    what
        What it is, for messages.
    """

    def __init__(self, path: str, file: AppendFile, total: Hash, nbytes: int, what: str) -> None:
        self.path = path
        self._file = file
        self._hash = total
        self._nbytes = nbytes
        self._what = what
        self._offset = file.size
        self._open = True

    @property
    def offset(self) -> int:
        """Where the bytes start that are wanted next."""
        return self._offset

    @property
    def complete(self) -> bool:
        """Whether all bytes are there: it is time for `finish`."""
        return self._offset == self._nbytes

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Take in a piece and sync it. What is there already is passed over.

        Raises
        ------
        ProtocolError
            The piece leaves a gap, or goes beyond the end. Nothing was written.
        OSError
            The disk failed or is full.
        """
        check(self._open, "a receiver was used after it was closed")
        if not 0 <= offset <= self._offset or offset + len(data) > self._nbytes:
            raise ProtocolError(
                f"a piece of {len(data)} bytes at {offset} of {self._what} of {self._nbytes} bytes of which "
                f"{self._offset} are there"
            )
        fresh = memoryview(data)[self._offset - offset :]
        if not len(fresh):
            return
        try:
            write_paced(self._file, [fresh], None)
        except BaseException:
            self.close()
            raise
        self._hash.update(fresh)
        self._offset += len(fresh)

    def close(self) -> None:
        """Stop receiving; what is there stays, to be gone on with. Idempotent."""
        if self._open:
            self._open = False
            self._file.close()

    def _check_complete(self) -> None:
        if not self.complete:
            raise ProtocolError(f"{self._nbytes - self._offset} bytes of {self._what} are missing")
