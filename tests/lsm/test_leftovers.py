"""What a failed flush or compaction leaves behind: nothing that keeps memory, and no file that stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from lsm.shelf import GROUP, Shelf
from lsm.test_machine import NOOP, apply, content, create, write

from marble.jobs import CompactJob, WriteJob
from marble.types import Members, SnapshotMeta


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What goes goes at once, or is found to stay."""
    gc.disable()
    yield
    gc.enable()


def filled() -> Shelf:
    shelf = Shelf()
    apply(shelf.machine, NOOP, create(), write(*((i, "x" * 50) for i in range(30))))
    return shelf


def write_job(shelf: Shelf) -> tuple[WriteJob, weakref.ref[object]]:
    state = shelf.machine.capture()
    meta = SnapshotMeta(state.applied_index, 1, Members((1,)))
    return WriteJob(GROUP, shelf.snapshots, meta, {}, state, None), weakref.ref(state)


@pytest.mark.usefixtures("without_collector")
def test_a_snapshot_that_failed_lets_its_state_go() -> None:
    shelf = filled()
    job, state = write_job(shelf)
    shelf.files.full = True
    job.run()
    assert isinstance(job.error, OSError)
    assert job.error.__traceback__ is None
    assert state() is None


def test_a_file_that_cannot_be_opened_behind_its_writing_is_not_kept() -> None:
    shelf = filled()
    names = []
    for _ in range(2):
        job, _state = write_job(shelf)
        shelf.files.fail_read_at = shelf.files.reads + 1
        job.run()
        assert isinstance(job.error, OSError)
        names += shelf.names()
        apply(shelf.machine, write((1, "y")))
    assert names
    shelf.files.fail_read_at = None
    shelf.snapshot()
    apply(shelf.machine, write((2, "z")))
    shelf.snapshot()
    assert not set(names) & set(shelf.names())
    assert {name[9:-6] for name in shelf.names()} == shelf.snapshots.kept()


@pytest.mark.usefixtures("without_collector")
def test_a_compaction_that_failed_leaves_nothing() -> None:
    shelf = filled()
    shelf.snapshot()
    apply(shelf.machine, write((1, "y")))
    shelf.snapshot()
    before = shelf.names()
    for operation in range(1, 20):
        shelf.files.fail_at = shelf.files.operations + operation
        job = CompactJob(GROUP, shelf.machine, None)
        job.run()
        if job.error is None:
            break
        assert job.error.__traceback__ is None
        shelf.files.fail_at = None
        shelf.machine.collect(shelf.snapshots.kept)
        assert shelf.names() == before
    assert operation > 3
    for failing in range(1, 3):
        shelf = filled()
        shelf.snapshot()
        apply(shelf.machine, write((1, "y")))
        shelf.snapshot()
        shelf.files.fail_read_at = shelf.files.reads + failing
        job = CompactJob(GROUP, shelf.machine, None)
        job.run()
        if job.error is None:
            break
        shelf.machine.collect(shelf.snapshots.kept)
        assert shelf.names() == before
    assert failing == 2
    assert content(shelf.machine)[1] == (1, "y")
