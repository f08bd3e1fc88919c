"""Writing large files beside the log: in small synced parts, at a measured pace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import pyarrow as pa

from marble.env import AppendFile

SYNC_BYTES: Final = 1024 * 1024
"""A file is synced each time that so many bytes were written. Unsynced, they would gather and then hold up the sync of
the log on the same disk."""


def write_paced(
    file: AppendFile, messages: Iterable[bytes | memoryview | pa.Buffer], pace: Callable[[int], None] | None
) -> None:
    """Write and sync all `messages`, with a sync at least every `SYNC_BYTES` and `pace` called after each."""
    unsynced = 0

    def sync() -> None:
        nonlocal unsynced
        file.sync()
        if pace is not None:
            pace(unsynced)
        unsynced = 0

    for message in messages:
        view = memoryview(message)
        while len(view):
            part = view[: SYNC_BYTES - unsynced]
            file.write(part)
            unsynced += len(part)
            view = view[len(part) :]
            if unsynced == SYNC_BYTES:
                sync()
    if unsynced:
        sync()
