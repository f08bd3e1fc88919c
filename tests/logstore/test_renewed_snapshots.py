"""A snapshot that is made anew takes the place of the one of the same entry, whole, or not at all."""

from __future__ import annotations

import contextlib

import pytest
from logstore.snapshot_support import ENDPOINTS, check_whole, content, expected, meta, state, write
from logstore.support import disk

from marble.errors import UnavailableError
from marble.logstore.snapshots import SnapshotInfo, SnapshotStore
from marble.testing.disk import DiskCrash

OTHER = {9: "new:9"}
"""By which the later one is told from the former: their rows are the same."""


def renew(store: SnapshotStore) -> SnapshotInfo:
    return store.write(meta(10), OTHER, state(10), renew=True)


def test_it_takes_its_place() -> None:
    files = disk()
    store = SnapshotStore(files, 1)
    old = write(store, 10)
    new = renew(store)
    assert store.infos() == [new]
    assert (new.meta, new.endpoints, old.endpoints) == (old.meta, OTHER, ENDPOINTS)
    assert content(store, new) == expected(10)
    with pytest.raises(UnavailableError):
        store.read(old)
    assert SnapshotStore(files, 1).infos() == [new]
    assert files.list("snapshots") == [path for path in files.list("snapshots") if path.endswith(".arrows")]


def test_nobody_loses_what_he_reads() -> None:
    files = disk()
    store = SnapshotStore(files, 1)
    old = write(store, 10)
    with store.pinned():
        assert renew(store) == old
        assert content(store, old) == expected(10)
    # One who comes while it is being written is in time, too.
    pieces = iter(state(10))

    def late() -> object:
        yield next(pieces)
        store.pin(10)
        yield from pieces

    assert store.write(meta(10), OTHER, late(), renew=True) == old  # type: ignore[arg-type]
    assert content(store, old) == expected(10)
    store.unpin(10)
    assert renew(store).endpoints == OTHER
    assert not [name for name in files.list("snapshots") if name.endswith(".tmp")]


def test_power_lost_at_every_operation_leaves_one_of_them() -> None:
    found = set()
    for seed in range(8):
        for operation in range(1, 50):
            files = disk(100 * seed + operation)
            store = SnapshotStore(files, 1)
            write(store, 10)
            files.lose_power_at = files.operations + operation
            with contextlib.suppress(DiskCrash):
                renew(store)
                break
            files.crash()
            (info,) = check_whole(files, [10]).infos()
            found.add(str(info.endpoints))
        assert 3 < operation < 49
    assert found == {str(ENDPOINTS), str(OTHER)}


def test_the_disk_fails_at_every_operation() -> None:
    for operation in range(1, 50):
        files = disk(operation)
        store = SnapshotStore(files, 1)
        write(store, 10)
        files.fail_at = files.operations + operation
        try:
            renew(store)
            break
        except OSError:
            (info,) = store.infos()
            assert content(store, info) == expected(10)
        assert renew(store).endpoints == OTHER
        files.crash()
        (info,) = check_whole(files, [10]).infos()
        assert info.endpoints == OTHER
    assert 3 < operation < 49
