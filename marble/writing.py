"""Writing large files beside the log: in small synced parts, at a measured pace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import pyarrow as pa

from marble.env import AppendFile

SYNC_BYTES: Final = 2 * 1024 * 1024
"""A file is synced each time that so many bytes were written. Unsynced, they would gather and then hold up the sync of
the log on the same disk. Where the file system keeps files in large pieces (ext4 from Linux 6.16 on, XFS), so many are a
huge page: a mapping then finds where they lie by one look for 2 MiB, and not by one for each 4 KiB."""


def write_paced(
    file: AppendFile,
    messages: Iterable[bytes | memoryview | pa.Buffer],
    pace: Callable[[int], None] | None,
    sync_bytes: int = SYNC_BYTES,
) -> None:
    """Write and sync all `messages`, with a sync at least every `sync_bytes` and `pace` called after each.

    What goes under one sync is written by one call: the system keeps a file in pieces as large as the writes that made it, and
    a mapping of large pieces is faulted in several times as fast as one of single pages.
    """
    parts: list[memoryview] = []
    gathered = 0

    def put() -> None:
        nonlocal gathered
        file.write(parts[0] if len(parts) == 1 else b"".join(parts))
        file.sync()
        if pace is not None:
            pace(gathered)
        parts.clear()
        gathered = 0

    for message in messages:
        view = memoryview(message).cast("B")
        while len(view):
            part = view[: sync_bytes - gathered]
            parts.append(part)
            gathered += len(part)
            view = view[len(part) :]
            if gathered == sync_bytes:
                put()
    if parts:
        put()
