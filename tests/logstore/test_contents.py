"""Files named by their content: whole or absent through every crash, and never under a name that is not theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from logstore.snapshot_support import ENDPOINTS, meta, state
from logstore.support import disk
from node.file_machine import content_name, files_batch

from marble.env import Files, SystemFiles
from marble.errors import CorruptionError, InvariantError, ProtocolError, UnavailableError
from marble.jobs import ReceiveJob
from marble.logstore.contents import ContentFiles
from marble.logstore.snapshots import SnapshotStore
from marble.machine import FileRef
from marble.testing.disk import DiskCrash, SimulatedFiles

PIECE = 700


def path_of(ref: FileRef, group: int = 1) -> str:
    return f"tables/{group:08x}-{ref.name}.arrow"


def put(files: SimulatedFiles, data: bytes) -> FileRef:
    """A file as a machine would have made it."""
    ref = FileRef(content_name(data), len(data))
    files.put(path_of(ref), data)
    return ref


def receive(contents: ContentFiles, source: ContentFiles, ref: FileRef) -> int:
    """Fetch a file; returns how many bytes were asked for."""
    receiver = contents.receive(ref)
    asked = ref.nbytes - receiver.offset
    while not receiver.complete:
        receiver.write(receiver.offset, source.piece(ref.key, receiver.offset, PIECE))
    receiver.finish()
    return asked


@pytest.fixture
def files() -> SimulatedFiles:
    return disk()


SOURCE_FILES = disk(99)
CONTENTS = [Random(number).randbytes(500 + 900 * number) for number in range(4)]
REFS = [put(SOURCE_FILES, data) for data in CONTENTS]
SOURCE = SnapshotStore(SOURCE_FILES, 1)
INFO = SOURCE.write(meta(20), ENDPOINTS, [*state(20), files_batch(REFS[:2]), files_batch(REFS[1:])])


# -- names ---------------------------------------------------------------------------------------------------------------


def test_a_snapshot_says_which_files_it_refers_to() -> None:
    assert SOURCE.files(INFO) == tuple(REFS)
    assert SOURCE.kept() == {ref.name for ref in REFS}
    plain = SnapshotStore(disk(), 1)
    assert plain.files(plain.write(meta(3), {}, state(3))) == ()


@pytest.mark.parametrize(
    "ref", [FileRef("../../etc/passwd", 5), FileRef("A" * 32, 5), FileRef("a" * 31, 5), FileRef("a" * 32, 0)]
)
def test_a_snapshot_that_refers_to_what_cannot_be_is_refused(ref: FileRef) -> None:
    store = SnapshotStore(disk(), 1)
    info = store.write(meta(3), {}, [files_batch([ref])])
    with pytest.raises(CorruptionError, match="refers to a file"):
        store.files(info)
    receiver = SnapshotStore(disk(), 1).receive(info)
    receiver.write(0, store.piece(info, 0, info.nbytes))
    with pytest.raises(CorruptionError, match="refers to a file"):
        receiver.check()


def test_one_file_has_one_length() -> None:
    store = SnapshotStore(disk(), 1)
    info = store.write(meta(3), {}, [files_batch([FileRef("a" * 32, 5)]), files_batch([FileRef("a" * 32, 6)])])
    with pytest.raises(CorruptionError, match="two lengths"):
        store.files(info)


def test_names_and_paths(files: SimulatedFiles) -> None:
    contents = ContentFiles(files, 1)
    assert contents.names() == []
    refs = [put(files, data) for data in CONTENTS]
    put_elsewhere = ContentFiles(files, 2)
    assert sorted(contents.names()) == sorted(ref.name for ref in refs)
    assert put_elsewhere.names() == []
    assert contents.name_of(f"/data/1/{path_of(refs[0])}") == contents.name_of(path_of(refs[0])) == refs[0].name
    assert contents.name_of(path_of(refs[0], 2)) is None
    assert contents.name_of("/data/1/log/0000000000000001.arrows") is None
    with pytest.raises(InvariantError, match="no name of a file"):
        contents.path("../LOCK")


def test_what_is_missing(files: SimulatedFiles) -> None:
    contents = ContentFiles(files, 1)
    for data in CONTENTS[:2]:
        put(files, data)
    assert contents.missing([*REFS, *REFS]) == REFS[2:]
    files.cut(path_of(REFS[0]), 100)
    contents.blame([REFS[1].name])
    assert contents.missing(REFS) == REFS
    contents.blame([])
    assert contents.missing(REFS) == [REFS[0], *REFS[2:]]


# -- pieces --------------------------------------------------------------------------------------------------------------


def test_pieces_are_the_file() -> None:
    source = ContentFiles(SOURCE_FILES, 1)
    for ref, data in zip(REFS, CONTENTS, strict=True):
        parts = [source.piece(ref.key, at, PIECE) for at in range(0, ref.nbytes, PIECE)]
        assert b"".join(parts) == data
        for offset, size in ((-1, 5), (ref.nbytes, 5), (0, 0)):
            with pytest.raises(ProtocolError, match="asked for"):
                source.piece(ref.key, offset, size)


def test_no_piece_of_what_is_not_there_or_damaged(files: SimulatedFiles) -> None:
    contents = ContentFiles(files, 1)
    with pytest.raises(UnavailableError):
        contents.piece(REFS[0].key, 0, 10)
    put(files, CONTENTS[0])
    assert contents.piece(REFS[0].key, 0, 10) == CONTENTS[0][:10]
    contents.blame([REFS[0].name])
    with pytest.raises(UnavailableError):
        contents.piece(REFS[0].key, 0, 10)
    contents.blame([])
    files.remove(path_of(REFS[0]))
    with pytest.raises(UnavailableError, match="could not be read"):
        contents.piece(REFS[0].key, 0, 10)


def test_verify(files: SimulatedFiles) -> None:
    contents = ContentFiles(files, 1)
    (ref,) = (put(files, CONTENTS[1]),)
    contents.verify(ref)
    for bit in range(0, 8 * ref.nbytes, 797):
        files.flip_bit(path_of(ref), bit)
        with pytest.raises(CorruptionError, match="not those that its name") as caught:
            contents.verify(ref)
        assert caught.value.path is not None
        assert path_of(ref) in caught.value.path
        files.flip_bit(path_of(ref), bit)
    files.cut(path_of(ref), 7)
    with pytest.raises(CorruptionError, match="7 bytes"):
        contents.verify(ref)
    files.remove(path_of(ref))
    with pytest.raises(CorruptionError, match="missing"):
        contents.verify(ref)


# -- receiving -----------------------------------------------------------------------------------------------------------


def test_received_on_a_real_disk(tmp_path: Path) -> None:
    contents = ContentFiles(SystemFiles(tmp_path), 1)
    for ref in REFS:
        assert receive(contents, SOURCE.contents, ref) == ref.nbytes
        contents.verify(ref)
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(
        path_of(ref).split("/")[1] for ref in REFS
    )


def test_pieces_arrive_doubled_overlapping_and_with_gaps(files: SimulatedFiles) -> None:
    contents, ref = ContentFiles(files, 1), REFS[2]
    receiver = contents.receive(ref)
    receiver.write(0, CONTENTS[2][:100])
    receiver.write(0, CONTENTS[2][:100])
    receiver.write(50, CONTENTS[2][50:200])
    assert contents.receive(ref) is receiver
    assert receiver.offset == 200
    for offset, size in ((201, 5), (-1, 2), (200, ref.nbytes)):
        with pytest.raises(ProtocolError, match="of which 200 are there"):
            receiver.write(offset, b"x" * size)
    with pytest.raises(ProtocolError, match="missing"):
        receiver.finish()
    assert not contents.has(ref)
    assert receive(contents, SOURCE.contents, ref) == ref.nbytes - 200
    with pytest.raises(InvariantError, match="after it was closed"):
        receiver.write(0, b"x")


def test_what_is_not_as_its_name_says_gets_no_name(files: SimulatedFiles) -> None:
    contents, ref = ContentFiles(files, 1), REFS[1]
    receiver = contents.receive(ref)
    receiver.write(0, b"?" + CONTENTS[1][1:])
    with pytest.raises(CorruptionError, match="fetched anew"):
        receiver.finish()
    assert files.list("tables") == []
    assert receive(contents, SOURCE.contents, ref) == ref.nbytes


def test_another_process_goes_on_and_several_files_wait(files: SimulatedFiles) -> None:
    contents = ContentFiles(files, 1)
    contents.receive(REFS[3]).write(0, CONTENTS[3][:2000])
    contents.receive(REFS[2]).write(0, CONTENTS[2][:1000])
    again = ContentFiles(files, 1)
    assert again.receive(REFS[3]).offset == 2000
    assert again.receive(REFS[2]).offset == 1000
    again.discard([REFS[3]])
    third = ContentFiles(files, 1)
    assert receive(third, SOURCE.contents, REFS[3]) == REFS[3].nbytes - 2000
    assert receive(third, SOURCE.contents, REFS[2]) == REFS[2].nbytes
    third.discard()
    assert all(name.endswith(".arrow") for name in files.list("tables"))


def test_a_part_that_is_too_long_is_not_gone_on_with(files: SimulatedFiles) -> None:
    files.put(path_of(REFS[0]).replace(".arrow", ".part"), bytes(REFS[0].nbytes + 1))
    assert receive(ContentFiles(files, 1), SOURCE.contents, REFS[0]) == REFS[0].nbytes


def test_groups_share_the_directory(files: SimulatedFiles) -> None:
    one, two = ContentFiles(files, 1), ContentFiles(files, 2)
    one.receive(REFS[0]).write(0, CONTENTS[0][:100])
    two.receive(REFS[0]).write(0, CONTENTS[0][:200])
    one.discard()
    assert ContentFiles(files, 2).receive(REFS[0]).offset == 200
    assert one.receive(REFS[0]).offset == 0


def test_a_healed_file_takes_the_place_of_the_damaged_one(files: SimulatedFiles) -> None:
    contents = ContentFiles(files, 1)
    ref = put(files, CONTENTS[1])
    files.flip_bit(path_of(ref), 99)
    contents.blame([ref.name])
    receive(contents, SOURCE.contents, ref)
    assert contents.damaged == frozenset()
    contents.verify(ref)


# -- crashes -------------------------------------------------------------------------------------------------------------


def run(store: SnapshotStore, ref: FileRef | None) -> ReceiveJob:
    """Receive one file, the snapshot's own if `ref` is None, as the jobs of a follower do."""
    job = ReceiveJob(store, INFO, ref)
    job.run()
    while job.error is None and not (job.arrived or job.complete or job.missing):
        data = (
            SOURCE.piece(INFO, job.offset, PIECE) if ref is None else SOURCE.contents.piece(ref.key, job.offset, PIECE)
        )
        job = ReceiveJob(store, INFO, ref, [(job.offset, data)])
        job.run()
    if job.error is not None:
        raise job.error
    return job


def receive_all(files: Files) -> None:
    store = SnapshotStore(files, 1)
    job = run(store, None)
    for ref in job.missing:
        # What is left of a torn part may be wrong once.
        with contextlib.suppress(CorruptionError):
            run(store, ref)
        if not store.contents.has(ref):
            run(store, ref)
    if job.missing:
        assert run(store, None).complete


def check_whole(files: SimulatedFiles) -> SnapshotStore:
    """Whatever has a name is what it says, and a snapshot has all that it refers to."""
    store = SnapshotStore(files, 1)
    for name in store.contents.names():
        path = f"tables/{1:08x}-{name}.arrow"
        assert content_name(files.read(path)) == name
    for info in store.infos():
        assert info == INFO
        assert store.contents.missing(store.files(info)) == []
    return store


def before(files: SimulatedFiles) -> None:
    """A file that is here already, and half of another one."""
    put(files, CONTENTS[0])
    files.put(path_of(REFS[3]).replace(".arrow", ".part"), CONTENTS[3][:1500])


def count(action: Callable[[SimulatedFiles], None]) -> tuple[int, int]:
    files = disk()
    before(files)
    start = files.operations
    action(files)
    return start, files.operations


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fault", ["lose_power_at", "fail_at"])
def test_a_crash_at_every_operation_of_receiving_a_snapshot_with_its_files(seed: int, fault: str) -> None:
    start, end = count(receive_all)
    assert end - start > 40
    for operation in range(start + 1, end + 1):
        files = disk(1000 * seed + operation)
        before(files)
        setattr(files, fault, operation)
        with contextlib.suppress(DiskCrash, OSError):
            receive_all(files)
        if fault == "lose_power_at":
            files.crash()
        shown = check_whole(files).infos()
        files.crash()
        assert check_whole(files).infos() == shown, "what a restarted process shows is on the disk"
        receive_all(files)
        files.crash()
        store = check_whole(files)
        assert store.newest() == INFO
        assert not [name for name in files.list("tables") if not name.endswith(".arrow")]


@pytest.mark.parametrize("seed", range(4))
def test_power_is_lost_twice(seed: int) -> None:
    start, end = count(receive_all)
    for operation in range(start + 1, end + 1, 3):
        files = disk(77 * seed + operation)
        before(files)
        files.lose_power_at = operation
        with contextlib.suppress(DiskCrash):
            receive_all(files)
        files.crash()
        files.lose_power_at = files.operations + 1 + (operation * 7 + seed) % (end - start)
        with contextlib.suppress(DiskCrash):
            receive_all(files)
        files.crash()
        receive_all(files)
        files.crash()
        assert check_whole(files).newest() == INFO
