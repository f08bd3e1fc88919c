"""What the tests of snapshots share: states that tell which index they are of, and what a store should give back."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from marble.env import Files
from marble.logstore.snapshots import Receiver, SnapshotInfo, SnapshotStore
from marble.machine import SNAPSHOT_SCHEMA
from marble.types import Members, SnapshotMeta

MEMBERS = Members((1, 2, 3), (1, 2), (7,), (), True)
ENDPOINTS = {1: "a:1", 2: "b:2", 3: "[::1]:3", 7: "d:4"}
NAME = "snapshots/00000001-{:016x}-0000000000000002.arrows".format


def meta(index: int) -> SnapshotMeta:
    return SnapshotMeta(index, 2, MEMBERS)


def state(index: int, count: int = 3, size: int = 300) -> list[pa.RecordBatch]:
    """A state that tells of which index it is, in batches of two rows."""
    rows = [
        {"section": "rows", "table": row, "payload": f"{index}/{row};".encode() * (size // 8)}
        for row in range(2 * count)
    ]
    return [pa.RecordBatch.from_pylist(rows[at : at + 2], SNAPSHOT_SCHEMA) for at in range(0, len(rows), 2)]


def write(store: SnapshotStore, index: int, count: int = 3, size: int = 300) -> SnapshotInfo:
    return store.write(meta(index), ENDPOINTS, state(index, count, size))


def content(store: SnapshotStore, info: SnapshotInfo) -> list[dict[str, object]]:
    return [row for batch in store.read(info) for row in batch.to_pylist()]


def expected(index: int, count: int = 3, size: int = 300) -> list[dict[str, object]]:
    return [row for batch in state(index, count, size) for row in batch.to_pylist()]


def check_whole(files: Files, indexes: Sequence[int]) -> SnapshotStore:
    """All there is on `files` are whole snapshots of some of `indexes`."""
    store = SnapshotStore(files, 1)
    for info in store.infos():
        assert info.index in indexes
        assert info.meta == meta(info.index)
        assert content(store, info) == expected(info.index)
    return store


def transfer(source: SnapshotStore, info: SnapshotInfo, receiver: Receiver, size: int = 400) -> None:
    while not receiver.complete:
        receiver.write(receiver.offset, source.piece(info, receiver.offset, size))
