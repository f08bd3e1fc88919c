"""Making the end of a scanned log fit to be continued.

Rule 1: only bytes that a scan has judged to be a torn tail, or room, are taken away.
Rule 2: every step leaves a log that opens with the same entries, or fewer torn bytes, if a crash stops it there.
Rule 3: nothing that was read is relied upon before it is known to be on the disk. What no evidence covers may be in the
        page cache only, where even a failed sync leaves it looking sound, and a further sync of it succeeds without
        writing anything. So those bytes are not synced again: the segment is written anew and takes the old one's name.
Rule 4: every segment but number 1 opens with the base: of each group that the log knows, its hard state and its SNAPSHOT
        row as they are on the disk when the segment is started. So whoever reads the log from there on knows what the
        segments before it have decided, and which of their entries are still needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from marble._core import frame
from marble.env import AppendFile, Files
from marble.logstore.extents import OnDisk
from marble.logstore.room import Room, zeros_behind
from marble.logstore.scan import Tail
from marble.logstore.segment import (
    DIRECTORY,
    FORMAT,
    SYNCED_PATH,
    TEMPORARY_SUFFIX,
    WINDOW_BYTES,
    segment_path,
)


def prepare_directory(files: Files) -> None:
    """Make the log's directory, and clear away what a crash in the middle of a repair has left in it.

    A process may have been killed before it had synced the parent, hence the sync. Names in the directory itself need
    none here: evidence that a frame is durable includes its segment's name, and without evidence `repair` syncs the
    name.
    """
    files.make_directory(DIRECTORY)
    for name in files.list(DIRECTORY):
        if name.endswith(TEMPORARY_SUFFIX):
            files.remove(f"{DIRECTORY}/{name}")
    files.sync_directory("")


def create_segment(
    files: Files, number: int, chain: int, groups: Mapping[int, OnDisk], room: Room
) -> tuple[AppendFile, Tail]:
    """A new segment, durable with its opening and its name."""
    opening, tail = _opening(number, chain, groups)
    path = segment_path(number)
    file, name = room.take(path)
    try:
        # Never ahead of a new file: it is the frames that tell how much is worth it.
        file.write(memoryview(opening), zeros_behind(0, file.room, opening.size, 0))
        file.sync()
        if name != path:
            files.rename(name, path)
        files.sync_directory(DIRECTORY)
    except BaseException:
        file.close()
        raise
    return file, tail


def _opening(number: int, chain: int, groups: Mapping[int, OnDisk]) -> tuple[pa.Buffer, Tail]:
    """What a segment begins with, and where that ends: its header and, unless it is the first, the base."""
    header, checksum = frame.encode_header(FORMAT, number, chain)
    if number == 1:
        return header, Tail(number, header.size, header.size, checksum, header.size, header.size)
    states = [(group, o.hard_state.term, o.hard_state.vote, o.hard_state.commit) for group, o in groups.items()]
    starts = [(group, o.purged_index, o.purged_term, o.last_index) for group, o in groups.items()]
    base, _, checksum = frame.encode(states, [], number, header.size, 0, checksum, starts)
    end = header.size + base.size
    return pa.py_buffer(header.to_pybytes() + base.to_pybytes()), Tail(number, end, end, checksum, end, end)


def repair(
    files: Files, tail: Tail, groups: Mapping[int, OnDisk], room: Room, *, mark_is_ahead: bool
) -> tuple[AppendFile, Tail]:
    """Cut what is torn at `tail`, and room, make the rest durable, and open it to be continued.

    Parameters
    ----------
    files
        The node's files.
    tail
        Where the scan ended.
    groups
        What the log holds of each group, for the base of a segment that has to be made anew.
    room
        Without spares as yet.
    mark_is_ahead
        The mark speaks of bytes that are no longer there: it goes, after the tail is in order, since it would call
        whatever is written there next damage.

    Returns
    -------
        The last segment, and where it ends now.

    Raises
    ------
    OSError
        The disk fails; nothing was lost by that.
    """
    path = segment_path(tail.segment)
    if tail.segment == 0:
        return create_segment(files, 1, 0, groups, room)
    if tail.end == 0:
        opening, fixed = _opening(tail.segment, tail.chain, groups)
        file = _replace(files, path, memoryview(opening), 0)
    else:
        if tail.end > tail.durable:
            file = _replace(files, path, memoryview(b""), tail.end)
        else:
            if tail.size > tail.end:
                files.truncate(path, tail.end)
            file = files.open_append(path)
        fixed = Tail(tail.segment, tail.end, tail.end, tail.chain, tail.end, tail.opening)
    if mark_is_ahead:
        files.remove(SYNCED_PATH)
        files.sync_directory(DIRECTORY)
    return file, fixed


def _replace(files: Files, path: str, head: memoryview, copy_bytes: int) -> AppendFile:
    """Put a new file with `head` and the first `copy_bytes` of the old one in its place."""
    file = files.create(path + TEMPORARY_SUFFIX)
    try:
        file.write(head)
        offset = 0
        while offset < copy_bytes:
            data = files.read(path, offset, min(WINDOW_BYTES, copy_bytes - offset))
            if not data:
                raise OSError(f"{files.describe(path)} became shorter while it was read")
            file.write(data)
            offset += len(data)
        file.sync()
        files.rename(path + TEMPORARY_SUFFIX, path)
        files.sync_directory(DIRECTORY)
    except BaseException:
        file.close()
        raise
    return file
