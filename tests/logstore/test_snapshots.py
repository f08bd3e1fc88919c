"""Snapshots on disk: whole or absent through every crash, damaged nowhere unnoticed, received in pieces and resumed."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from logstore.snapshot_support import (
    ENDPOINTS,
    MEMBERS,
    NAME,
    check_whole,
    content,
    expected,
    meta,
    state,
    transfer,
    write,
)
from logstore.support import disk

from marble.env import SystemFiles, SystemRandom
from marble.errors import CorruptionError, InvariantError, ProtocolError, UnavailableError
from marble.logstore.snapshot_file import FILE_SCHEMA
from marble.logstore.snapshots import SYNC_BYTES, SnapshotInfo, SnapshotStore
from marble.machine import SNAPSHOT_SCHEMA
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.types import Members, SnapshotMeta


@pytest.fixture
def files() -> SimulatedFiles:
    return disk()


def test_written_and_read(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    assert store.infos() == []
    assert store.newest() is None
    second, first = write(store, 20), write(store, 10)
    assert store.infos() == [first, second]
    assert store.newest() == second
    assert (first.group, first.index, first.term, first.members) == (1, 10, 2, MEMBERS)
    assert first.endpoints == ENDPOINTS
    assert first.nbytes == files.size(NAME(10))
    assert content(store, first) == expected(10)
    assert all(batch.schema == SNAPSHOT_SCHEMA for batch in store.read(first))
    assert SnapshotStore(files, 1).infos() == [first, second]
    assert write(store, 10) is first


def test_an_empty_state(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = store.write(SnapshotMeta(0, 0, Members()), {}, [state(1)[0].slice(0, 0)])
    assert list(store.read(info)) == []
    assert SnapshotStore(files, 1).infos() == [info]


def test_on_a_real_disk(tmp_path: Path) -> None:
    store = SnapshotStore(SystemFiles(tmp_path), 1)
    info = write(store, 10, 8, 300_000)
    assert content(store, info) == expected(10, 8, 300_000)
    target = SnapshotStore(SystemFiles(tmp_path / "other"), 1)
    receiver = target.receive(info)
    transfer(store, info, receiver, 1 << 20)
    assert receiver.finish() == info
    reopened = SnapshotStore(SystemFiles(tmp_path / "other"), 1)
    assert content(reopened, info) == expected(10, 8, 300_000)
    assert [path.name for path in (tmp_path / "other" / "snapshots").iterdir()] == [NAME(10).split("/")[1]]


def test_any_arrow_tool_opens_it(files: SimulatedFiles) -> None:
    write(SnapshotStore(files, 1), 10)
    table = pa.ipc.open_stream(files.read(NAME(10))).read_all()
    assert table.schema == FILE_SCHEMA
    assert table.column("section").to_pylist() == ["meta", *["rows"] * 6, "end"]
    described = json.loads(table.column("payload")[0].as_py())
    assert described["endpoints"] == {str(node): endpoint for node, endpoint in ENDPOINTS.items()}
    assert described["members"]["voters"] == [1, 2, 3]
    assert int(json.loads(table.column("payload")[7].as_py())["rows"], 16) == 7


def test_groups_share_the_directory(files: SimulatedFiles) -> None:
    one, two = SnapshotStore(files, 1), SnapshotStore(files, 2)
    info = write(one, 10)
    other = two.write(meta(30), {}, state(30))
    two.receive(SnapshotInfo(2, 40, 2, MEMBERS, {}, 500, 1)).write(0, b"x" * 100)
    one.receive(SnapshotInfo(1, 40, 2, MEMBERS, {}, 500, 1))
    one.discard_partial()
    files.put("snapshots/00000002-x.tmp", b"x")
    files.put("snapshots/README", b"x")
    assert SnapshotStore(files, 1).infos() == [info]
    assert files.exists("snapshots/00000002-x.tmp")
    assert any(name.endswith(".part") for name in files.list("snapshots"))
    assert SnapshotStore(files, 2).infos() == [other]
    assert files.list("snapshots")[-1] == "README"
    with pytest.raises(InvariantError, match="group 2"):
        one.receive(other)


# -- pace ----------------------------------------------------------------------------------------------------------------


class Watched(SimulatedFiles):
    """Notes how many bytes each sync of a file had to write."""

    def __init__(self) -> None:
        super().__init__(SystemRandom(0))
        self.synced: list[int] = []

    def sync_node(self, path: str, node: object) -> None:
        self.synced.append(sum(len(data) for _, data in node.dirty))  # type: ignore[attr-defined]
        super().sync_node(path, node)  # type: ignore[arg-type]


def test_written_in_small_synced_parts_with_pauses() -> None:
    files = Watched()
    paces: list[int] = []

    def pace(nbytes: int) -> None:
        paces.append(nbytes)
        assert paces == files.synced

    info = SnapshotStore(files, 1).write(meta(10), {}, state(10, 5, 700_000), pace)
    assert sum(paces) == info.nbytes
    assert paces[:-1] == [SYNC_BYTES] * (len(paces) - 1)
    assert len(paces) == 3


def test_received_in_small_synced_parts() -> None:
    source = SnapshotStore(disk(), 1)
    info = write(source, 10, 5, 700_000)
    files = Watched()
    receiver = SnapshotStore(files, 1).receive(info)
    transfer(source, info, receiver, 3 << 20)
    assert max(files.synced) == SYNC_BYTES
    assert sum(files.synced) == info.nbytes


def test_giving_up_in_a_pause_leaves_nothing(files: SimulatedFiles) -> None:
    def pace(nbytes: int) -> None:
        raise UnavailableError("the node stops")

    store = SnapshotStore(files, 1)
    with pytest.raises(UnavailableError, match="the node stops"):
        store.write(meta(10), {}, state(10), pace)
    assert store.infos() == []
    assert files.list("snapshots") == []


def test_a_state_that_fails_leaves_nothing(files: SimulatedFiles) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield state(10)[0]
        raise InvariantError("no more")

    with pytest.raises(InvariantError, match="no more"):
        SnapshotStore(files, 1).write(meta(10), {}, batches())
    assert files.list("snapshots") == []


# -- removing ------------------------------------------------------------------------------------------------------------


def test_pruned_but_for_the_newest_and_the_pinned(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    infos = [write(store, index) for index in (10, 20, 30, 40)]
    store.pin(20)
    store.pin(20)
    assert store.prune(30) == infos[0].nbytes
    assert [info.index for info in store.infos()] == [20, 30, 40]
    store.unpin(20)
    assert store.prune(1000) == infos[2].nbytes
    store.unpin(20)
    assert store.prune(1000) == infos[1].nbytes
    assert store.prune(1000) == 0
    assert store.infos() == [infos[3]]
    assert files.list("snapshots") == [NAME(40).split("/")[1]]
    with pytest.raises(InvariantError, match="not pinned"):
        store.unpin(20)
    with pytest.raises(UnavailableError, match="no snapshot at 20"):
        store.pin(20)


@pytest.mark.parametrize("seed", range(8))
def test_what_was_pruned_does_not_come_back(seed: int) -> None:
    files = disk(seed)
    store = SnapshotStore(files, 1)
    write(store, 10)
    write(store, 20)
    store.prune(20)
    files.crash()
    assert [info.index for info in SnapshotStore(files, 1).infos()] == [20]


def test_what_was_pruned_is_unavailable(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    old = write(store, 10)
    write(store, 20)
    store.prune(20)
    with pytest.raises(UnavailableError, match="no snapshot at 10 of term 2 here any more"):
        store.piece(old, 0, 10)
    with pytest.raises(UnavailableError, match="no snapshot at 10"):
        store.read(old)


def test_a_piece_of_what_is_pruned_while_it_is_asked_for_is_unavailable(
    files: SimulatedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SnapshotStore(files, 1)
    old = write(store, 10)
    write(store, 20)

    def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
        # On the thread that writes snapshots, between the look at what there is and the opening of the file.
        store.prune(20)
        return type(files).read(files, path, offset, size)

    monkeypatch.setattr(files, "read", read)
    with pytest.raises(UnavailableError, match="no snapshot at 10 of term 2 here any more"):
        store.piece(old, 0, 10)


# -- pieces --------------------------------------------------------------------------------------------------------------


def test_pieces_are_the_file(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = write(store, 10)
    whole = files.read(NAME(10))
    assert b"".join(store.piece(info, at, 77) for at in range(0, info.nbytes, 77)) == whole
    assert store.piece(info, 5, 1 << 30) == whole[5:]
    for offset, size in ((-1, 5), (info.nbytes, 5), (0, 0), (0, -1)):
        with pytest.raises(ProtocolError, match="asked for"):
            store.piece(info, offset, size)
    files.cut(NAME(10), 100)
    with pytest.raises(CorruptionError, match="offset 100"):
        store.piece(info, 90, 20)


def test_pieces_arrive_doubled_overlapping_and_with_gaps(files: SimulatedFiles) -> None:
    source = SnapshotStore(disk(), 1)
    info = write(source, 10)
    store = SnapshotStore(files, 1)
    receiver = store.receive(info)
    assert receiver.offset == 0
    receiver.write(0, source.piece(info, 0, 100))
    receiver.write(0, source.piece(info, 0, 100))
    receiver.write(50, memoryview(source.piece(info, 50, 150)))
    assert receiver.offset == 200
    for offset, size in ((201, 5), (-1, 2), (200, info.nbytes)):
        with pytest.raises(ProtocolError, match="of which 200 are there"):
            receiver.write(offset, b"x" * size)
    with pytest.raises(ProtocolError, match="missing"):
        receiver.finish()
    assert store.receive(info) is receiver
    transfer(source, info, receiver)
    assert store.infos() == []
    assert receiver.finish() == info
    assert store.infos() == [info]
    assert content(store, info) == expected(10)
    with pytest.raises(InvariantError, match="after it was closed"):
        receiver.write(0, b"x")


def test_another_snapshot_takes_the_place_of_the_one_under_way(files: SimulatedFiles) -> None:
    source = SnapshotStore(disk(), 1)
    old, new = write(source, 10), write(source, 20)
    store = SnapshotStore(files, 1)
    store.receive(old).write(0, source.piece(old, 0, 1000))
    receiver = store.receive(new)
    assert receiver.offset == 0
    assert len(files.list("snapshots")) == 1
    transfer(source, new, receiver)
    receiver.finish()
    assert store.receive(old).offset == 0
    store.discard_partial()
    assert files.list("snapshots") == [NAME(20).split("/")[1]]


def test_one_that_was_made_here_while_it_was_on_its_way_stays(files: SimulatedFiles) -> None:
    # Each node compacts for itself: the same state in other files is another snapshot of the same entry.
    source = SnapshotStore(disk(), 1)
    theirs = write(source, 10, count=4)
    store = SnapshotStore(files, 1)
    receiver = store.receive(theirs)
    transfer(source, theirs, receiver)
    own = write(store, 10)
    assert own != theirs
    assert receiver.finish() == own
    assert store.infos() == [own]
    assert content(store, own) == expected(10)
    assert files.list("snapshots") == [NAME(10).split("/")[1]]
    assert SnapshotStore(files, 1).infos() == [own]


def test_a_disk_that_fails_to_read_does_not_make_a_snapshot_damaged(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = write(store, 10)
    for reads in itertools.count(1):
        files.fail_read_at = files.reads + reads
        try:
            found = content(store, info)
            break
        except OSError as error:
            failure = str(error)
    assert "simulated failure of read" in failure
    assert reads > 4
    assert found == expected(10)
    files.fail_read_at = None
    assert content(SnapshotStore(files, 1), info) == expected(10)


def test_what_was_damaged_on_its_way_is_fetched_anew(files: SimulatedFiles) -> None:
    source = SnapshotStore(disk(), 1)
    info = write(source, 10)
    store = SnapshotStore(files, 1)
    receiver = store.receive(info)
    receiver.write(0, b"?" + source.piece(info, 1, info.nbytes))
    with pytest.raises(CorruptionError, match="damaged on its way"):
        receiver.finish()
    assert files.list("snapshots") == []
    receiver = store.receive(info)
    assert receiver.offset == 0
    transfer(source, info, receiver)
    assert receiver.finish() == info


@pytest.mark.parametrize(
    "claim",
    [
        lambda info: SnapshotInfo(1, 11, 2, MEMBERS, ENDPOINTS, info.nbytes, info.checksum),
        lambda info: SnapshotInfo(1, 10, 3, MEMBERS, ENDPOINTS, info.nbytes, info.checksum),
        lambda info: SnapshotInfo(1, 10, 2, Members((1,)), ENDPOINTS, info.nbytes, info.checksum),
        lambda info: SnapshotInfo(1, 10, 2, MEMBERS, {}, info.nbytes, info.checksum),
    ],
)
def test_a_file_that_is_not_what_was_announced(
    claim: Callable[[SnapshotInfo], SnapshotInfo], files: SimulatedFiles
) -> None:
    source = SnapshotStore(disk(), 1)
    info = write(source, 10)
    store = SnapshotStore(files, 1)
    receiver = store.receive(claim(info))
    transfer(source, info, receiver)
    with pytest.raises(CorruptionError, match="instead of"):
        receiver.finish()
    assert store.infos() == []
    assert files.list("snapshots") == []


# -- crashes -------------------------------------------------------------------------------------------------------------


def operations_of(act: Callable[[SimulatedFiles], None], prepare: Callable[[SimulatedFiles], None]) -> tuple[int, int]:
    """How many operations come before `act`, and how many after it."""
    files = disk()
    prepare(files)
    before = files.operations
    act(files)
    return before, files.operations


def one_snapshot(files: SimulatedFiles) -> None:
    write(SnapshotStore(files, 1), 10)


def two_in_quick_succession(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    write(store, 20)
    store.prune(20)
    write(store, 30)
    store.prune(30)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fault", ["lose_power_at", "fail_at"])
def test_a_crash_at_every_operation_of_writing_and_pruning(seed: int, fault: str) -> None:
    before, after = operations_of(two_in_quick_succession, one_snapshot)
    for operation in range(before + 1, after + 1):
        files = disk(1000 * seed + operation)
        one_snapshot(files)
        setattr(files, fault, operation)
        with contextlib.suppress(DiskCrash, OSError):
            two_in_quick_succession(files)
        shown = None
        if fault == "fail_at":
            shown = check_whole(files, (10, 20, 30)).infos()
        files.crash()
        store = check_whole(files, (10, 20, 30))
        assert store.infos(), "the newest is never lost"
        assert shown is None or store.infos() == shown, "what a restarted process shows is on the disk"
        files.crash()
        assert check_whole(files, (10, 20, 30)).infos() == store.infos()
        store = SnapshotStore(files, 1)
        write(store, 40)
        files.crash()
        assert check_whole(files, (10, 20, 30, 40)).newest() == store.newest()
        assert not [name for name in files.list("snapshots") if not name.endswith(".arrows")]


SOURCE_FILES = disk(99)
SOURCE = SnapshotStore(SOURCE_FILES, 1)
INFO = SOURCE.write(meta(20), ENDPOINTS, state(20))


def receive_all(files: SimulatedFiles) -> None:
    receiver = SnapshotStore(files, 1).receive(INFO)
    transfer(SOURCE, INFO, receiver, 900)
    receiver.finish()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fault", ["lose_power_at", "fail_at"])
def test_a_crash_at_every_operation_of_receiving(seed: int, fault: str) -> None:
    before, after = operations_of(receive_all, one_snapshot)
    for operation in range(before + 1, after + 1):
        files = disk(1000 * seed + operation)
        one_snapshot(files)
        setattr(files, fault, operation)
        with contextlib.suppress(DiskCrash, OSError):
            receive_all(files)
        if fault == "lose_power_at":
            files.crash()
        store = check_whole(files, (10, 20))
        if store.newest() != INFO:
            receive_all(files)
        files.crash()
        assert check_whole(files, (10, 20)).newest() == INFO
        assert files.read(NAME(20)) == SOURCE_FILES.read(NAME(20))


@pytest.mark.parametrize("seed", range(12))
def test_receiving_goes_on_after_a_crash_with_what_is_sound(seed: int) -> None:
    files = disk(seed)
    receiver = SnapshotStore(files, 1).receive(INFO)
    half = INFO.nbytes // 2
    receiver.write(0, SOURCE.piece(INFO, 0, half))
    files.sync_directory("snapshots")
    files.lose_power_at = files.operations + 1
    with pytest.raises(DiskCrash):
        receiver.write(half, SOURCE.piece(INFO, half, 1000))
    files.crash()
    receiver = SnapshotStore(files, 1).receive(INFO)
    assert half - 1500 < receiver.offset <= half + 1000, "only whole messages are kept, and of those all"
    transfer(SOURCE, INFO, receiver)
    receiver.finish()
    check_whole(files, (20,))


def test_what_an_earlier_process_was_receiving_makes_room_for_another(files: SimulatedFiles) -> None:
    source = SnapshotStore(disk(), 1)
    old = write(source, 10)
    SnapshotStore(files, 1).receive(old).write(0, source.piece(old, 0, 1000))
    store = SnapshotStore(files, 1)
    assert store.receive(INFO).offset == 0
    (name,) = files.list("snapshots")
    assert f"{INFO.checksum:016x}" in name


def test_a_part_that_is_longer_than_announced_is_not_gone_on_with(files: SimulatedFiles) -> None:
    SnapshotStore(files, 1).receive(INFO)
    (name,) = files.list("snapshots")
    longer = SnapshotStore(disk(), 1)
    info = write(longer, 20, 9)
    files.put(f"snapshots/{name}", longer.piece(info, 0, info.nbytes))
    assert SnapshotStore(files, 1).receive(INFO).offset == 0


def test_receiving_goes_on_after_a_failed_sync_with_what_is_written_anew(files: SimulatedFiles) -> None:
    """What a failed sync has marked clean looks sound and is nowhere: syncing that file again would prove nothing."""
    store = SnapshotStore(files, 1)
    receiver = store.receive(INFO)
    receiver.write(0, SOURCE.piece(INFO, 0, 1000))
    files.fail_at = files.operations + 2
    with pytest.raises(OSError, match="simulated"):
        receiver.write(1000, SOURCE.piece(INFO, 1000, INFO.nbytes))
    with pytest.raises(InvariantError, match="closed"):
        receiver.finish()
    receiver = store.receive(INFO)
    assert receiver.offset > 2000, "all of it looks sound"
    transfer(SOURCE, INFO, receiver)
    receiver.finish()
    files.crash()
    assert check_whole(files, (20,)).newest() == INFO


def test_the_disk_is_full(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    write(store, 10)
    files.fail_at = files.operations + 3
    with pytest.raises(OSError, match="simulated"):
        write(store, 20, 4)
    assert files.list("snapshots") == [NAME(10).split("/")[1]]
    assert [info.index for info in store.infos()] == [10]
    assert write(store, 20).index == 20
