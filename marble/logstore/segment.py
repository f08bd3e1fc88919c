"""Names of the log's files, a bounded way to read them, and the mark of what was synced.

Rule 1: nothing here judges. Whether odd bytes are a torn tail or damage is decided in `marble.logstore.scan` alone.

Files of a log, all in one directory:

- ``0000000000000001.arrows`` and on: segments, numbered from 1 without gaps; only the last one grows.
- ``SYNCED``: the mark, see `Mark`.
- ``*.tmp``: left by a crash in the middle of a repair, or a purged segment that is kept to be written over; never read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from marble._core import frame
from marble._core.checksum import xxh3_64
from marble.env import Files

DIRECTORY: Final = "log"
SYNCED_PATH: Final = f"{DIRECTORY}/SYNCED"
TEMPORARY_SUFFIX: Final = ".tmp"
FORMAT: Final = "1"
"""Version of the format, in the metadata of every segment's schema. Frames are sealed alike in all versions."""

FRAME_BYTES_LIMIT: Final = 1024 * 1024 * 1024
"""No frame of any log is longer, whatever the options of its writer: bounds what is read before a seal is verified."""

WINDOW_BYTES: Final = 4 * 1024 * 1024
"""How much of a segment is read at a time: large enough that opening the file does not count, small beside any heap."""

_ALIGNMENT: Final = 64
_SUFFIX: Final = ".arrows"
_DIGITS: Final = 16
_MARK_MAGIC: Final = b"marbSYN1"
_MARK: Final = struct.Struct("<8sQQQQ")
_SLOT_BYTES: Final = 64


def segment_path(number: int) -> str:
    """Path of segment `number` below the root of the node's files."""
    return f"{DIRECTORY}/{number:0{_DIGITS}d}{_SUFFIX}"


def segment_numbers(files: Files) -> list[int]:
    """Numbers of all segments that exist, ascending. Files with other names are not ours and are left alone."""
    if not files.exists(DIRECTORY):
        return []
    numbers = []
    for name in files.list(DIRECTORY):
        stem = name.removesuffix(_SUFFIX)
        if len(stem) == _DIGITS and name != stem and stem.isascii() and stem.isdecimal():
            numbers.append(int(stem))
    return sorted(numbers)


@dataclass(frozen=True, slots=True)
class Mark:
    """The log was durable up to ``offset`` of ``segment``, where the frame sealed with ``chain`` ends.

    The file SYNCED holds it in two slots of 64 bytes, written in turn, so that a torn write leaves the other one. It
    is written after every sync and never synced itself: it may be old, it may be missing, but where it speaks it
    speaks the truth. It is evidence against damage and is never needed to read the log.

    Slot, little-endian: magic ``marbSYN1``, uint64 count, uint64 segment, uint64 offset, uint64 chain, uint64 XXH3-64
    of these 40 bytes, zeros. Of two sound slots the one with the higher count is right.
    """

    count: int
    segment: int
    offset: int
    chain: int

    def pack(self) -> bytes:
        body = _MARK.pack(_MARK_MAGIC, self.count, self.segment, self.offset, self.chain)
        return (body + xxh3_64(body).to_bytes(8, "little")).ljust(_SLOT_BYTES, b"\0")

    @staticmethod
    def unpack(slot: bytes) -> Mark | None:
        """The mark in `slot`, or None if there is no sound one."""
        body = slot[: _MARK.size]
        if len(slot) != _SLOT_BYTES or slot[_MARK.size :] != xxh3_64(body).to_bytes(8, "little").ljust(24, b"\0"):
            return None
        magic, count, segment, offset, chain = _MARK.unpack(body)
        return Mark(count, segment, offset, chain) if magic == _MARK_MAGIC else None


@dataclass(frozen=True, slots=True)
class Still:
    """The files of a log at one moment, all of it durable.

    - ``sealed``: paths of the segments that do not change any more, ascending.
    - ``tail``: path of the last segment, of which ``tail_bytes`` count; it grows later.
    - ``mark``: what the file SYNCED says beside a log that ends there.
    """

    sealed: Sequence[str]
    tail: str
    tail_bytes: int
    mark: bytes

    @staticmethod
    def of(sealed: Sequence[int], segment: int, end: int, chain: int) -> Still:
        """Of these segments, the last of which is `segment`, whose sound part up to `end` was sealed with `chain`."""
        paths = [segment_path(number) for number in sealed]
        return Still(paths, segment_path(segment), end, 2 * Mark(1, segment, end, chain).pack())


def check_mark(data: bytes) -> str | None:
    """What is wrong with the bytes of the file SYNCED; None if nothing is. For those who look for damage: it does no harm."""
    slots = [data[at : at + _SLOT_BYTES] for at in range(0, len(data), _SLOT_BYTES)]
    if len(data) != 2 * _SLOT_BYTES:
        return f"it has {len(data)} bytes, not {2 * _SLOT_BYTES}"
    marks = [Mark.unpack(slot) for slot in slots]
    for number, (slot, mark) in enumerate(zip(slots, marks, strict=True)):
        if mark is None and any(slot):
            return f"slot {number} is not as it was written"
    return None if any(marks) else "it is empty"


def read_mark(files: Files) -> Mark | None:
    """The newest sound mark; None if the file is missing or damaged."""
    if not files.exists(SYNCED_PATH):
        return None
    data = files.read(SYNCED_PATH, 0, 2 * _SLOT_BYTES)
    marks = [mark for at in (0, _SLOT_BYTES) if (mark := Mark.unpack(data[at : at + _SLOT_BYTES])) is not None]
    return max(marks, key=lambda mark: mark.count, default=None)


class MarkFile:
    """Writes the mark. One thread at a time."""

    def __init__(self, files: Files, last: Mark | None) -> None:
        self._files = files
        self._named = last is not None
        self._count = 0 if last is None else last.count
        self._older = bytes(_SLOT_BYTES)
        self._newer = bytes(_SLOT_BYTES) if last is None else last.pack()

    def write(self, segment: int, offset: int, chain: int, *, both_slots: bool = False) -> None:
        """Note that everything up to here is durable. Raises OSError."""
        self._count += 1
        slot = Mark(self._count, segment, offset, chain).pack()
        self._older, self._newer = (slot, slot) if both_slots else (self._newer, slot)
        # The count decides which slot a mark lives in, so that the other slot's bytes do not change in this write.
        pair = (self._older, self._newer) if self._count % 2 else (self._newer, self._older)
        self._files.overwrite(SYNCED_PATH, pair[0] + pair[1])
        if not self._named:
            # What it says may be lost with the power. Its name may not: a log without it has been copied by somebody, or worse.
            self._files.sync_directory(DIRECTORY)
            self._named = True


class Window:
    """Reads a segment front to back in pieces of bounded size.

    Parameters
    ----------
    files
        Where the segment is.
    path
        The segment.
    size
        Its size; what a live writer adds later is not looked at.
    window_bytes
        How much to read at a time.
    """

    def __init__(self, files: Files, path: str, size: int, window_bytes: int = WINDOW_BYTES) -> None:
        self.size = size
        self._files = files
        self._path = path
        self._window_bytes = window_bytes
        self._data = b""
        self._start = 0

    def view(self, offset: int, size: int) -> tuple[bytes, int]:
        """``(data, at)``: `data` holds, from `at` on, at least `size` bytes of the file from `offset`, or all up to
        its end."""
        missing = min(offset + size, self.size) > self._start + len(self._data)
        if missing or offset < self._start:
            # The file may shrink only if someone else cuts it; then there are simply fewer bytes.
            self._data = self._files.read(self._path, offset, min(max(size, self._window_bytes), self.size - offset))
            self._start = offset
        return self._data, offset - self._start

    def forget(self) -> None:
        """Read anew from here on: the file may have changed."""
        self._data = b""

    def has_room(self, offset: int) -> bool:
        """Whether nothing but room is at `offset`, as far as its beginning tells (`marble.logstore.room`, rule 3)."""
        data, at = self.view(offset, _ALIGNMENT)
        return not any(data[at : at + _ALIGNMENT])

    def find_frame(self, segment: int, offset: int, bytes_max: int = FRAME_BYTES_LIMIT) -> frame.Seal | None:
        """The frame at `offset` of the file, or None if there is no sound and whole one."""
        size = frame.METADATA_BYTES_MAX
        while True:
            data, at = self.view(offset, size)
            found = frame.check(data, at, segment, offset, bytes_max)
            if isinstance(found, frame.Seal):
                return found
            if found == 0 or found > self.size - offset or found <= len(data) - at:
                return None
            size = found

    def find(self, needle: bytes, start: int) -> int | None:
        """Offset of the first `needle` at or behind `start`."""
        while start + len(needle) <= self.size:
            data, at = self.view(start, len(needle))
            found = data.find(needle, at)
            if found >= 0:
                return start + found - at
            searched = len(data) - at - len(needle) + 1
            if searched <= 0:
                return None
            start += searched
        return None
