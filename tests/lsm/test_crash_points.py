"""Each thing that is done with files, on its own: power lost at every one of its operations, with all, none or some of what no sync
has covered surviving; and the disk failing at every one of them.

`test_crashes` does so with a long history of some of them. Here the operations have names: a procedure that comes to do another kind
of operation, or does one no longer, fails its test, and so does one of whose kinds any was not interrupted.

A directory that is made is no crash point: `marble.env.Files.make_directory` makes it durable, and what is in it comes later.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import pytest
from lsm.shelf import GROUP, Noting, Shelf
from lsm.test_crashes import LOG
from node.ring import Ring
from node.test_rebuilding import eager

from marble._core import entry_batch
from marble.checkpoint import CHECKPOINTS, MANIFEST, Checkpoints, read_manifest, write_checkpoint
from marble.env import SystemRandom
from marble.errors import CorruptionError
from marble.identity import IDENTITY_FILE, seal
from marble.jobs import ReceiveJob
from marble.logstore.log import Log, LogOptions
from marble.logstore.snapshots import SnapshotInfo, SnapshotStore
from marble.lsm.machine import TableMachine
from marble.machine import FileRef
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.verify import verify

MINE: Final = 5
"""How many entries the node has applied on which a procedure runs."""
THEIRS: Final = 13
"""And the peer that it fetches from."""
PIECE_BYTES: Final = 1500

_KINDS: Final = {
    rf"tables/{GROUP:08x}-[0-9a-f]{{32}}\.arrow": "table",
    rf"tables/{GROUP:08x}-[0-9a-f]{{32}}\.part": "table.part",
    r"tables/.*\.tmp": "table.tmp",
    r"snapshots/.*\.arrows": "snapshot",
    r"snapshots/.*\.part": "snapshot.part",
    r"snapshots/.*\.tmp": "snapshot.tmp",
    r"(tables|snapshots|)": "directory",
}


class Traced(Noting):
    """A disk that says what was done with it: kinds of operations on kinds of files."""

    def __init__(self, seed: int) -> None:
        super().__init__(SystemRandom(seed))
        self.trace: list[str] = []

    def note(self, what: str, path: str) -> None:
        kind = next((kind for pattern, kind in _KINDS.items() if re.fullmatch(pattern, path)), path)
        self.trace.append(f"{what} {kind}")


class Life:
    """A node's tables on such a disk, with a log that loses nothing."""

    def __init__(self, seed: int, end: int = MINE) -> None:
        self.files = Traced(seed)
        self.end = end
        self.damaged: FileRef | None = None
        self.lacks: set[str] | None = None
        """Names of the files of the peer's snapshot that are not here."""
        self.open()

    def open(self) -> Shelf:
        self.shelf = Shelf(self.files)
        return self.shelf

    def apply(self, end: int) -> None:
        machine = self.shelf.machine
        first = machine.applied_index
        if end > first:
            machine.apply(entry_batch.build(1, first + 1, 1, list(LOG[first:end])))

    def check(self) -> None:
        """What is there is the state after some entry, whichever, and after the rest of the log that of its end."""
        machine = self.shelf.machine
        assert facts(machine) == facts_after(machine.applied_index)
        self.apply(self.end)
        assert facts(machine) == facts_after(max(self.end, machine.applied_index))
        machine.collect(self.shelf.snapshots.kept)
        needed = self.shelf.snapshots.kept() | {ref.name for ref in machine.live()}
        assert set(self.shelf.store.files.names()) == needed


def facts(machine: TableMachine) -> Any:
    tables = {info.id: machine.read(info.id).scan().read_all().to_pylist() for info in machine.tables()}
    return machine.applied_index, tables


@cache
def facts_after(index: int) -> Any:
    twin = TableMachine()
    if index:
        twin.apply(entry_batch.build(1, 1, 1, list(LOG[:index])))
    return facts(twin)


def with_snapshots(seed: int) -> Life:
    """Several files in level 0, and an older snapshot whose files the machine has, too."""
    life = Life(seed)
    for end in (3, MINE):
        life.apply(end)
        life.shelf.snapshot()
    return life


def with_more(seed: int) -> Life:
    life = with_snapshots(seed)
    life.end = 9
    life.apply(9)
    return life


def merged(seed: int) -> Life:
    """Compacted since its snapshot, which keeps the files of before."""
    life = with_snapshots(seed)
    assert life.shelf.compact() > 0
    return life


@cache
def peer() -> Shelf:
    """Another node, which is ahead."""
    life = with_snapshots(1)
    for end in (9, THEIRS):
        life.apply(end)
        life.shelf.snapshot()
    return life.shelf


# -- procedures --------------------------------------------------------------------------------------------------------


def snapshot(life: Life) -> None:
    life.shelf.snapshot()


def compact(life: Life) -> None:
    assert life.shelf.compact() > 0


def collect(life: Life) -> None:
    """A snapshot of the merged files takes the place of the one of the same entry, and the files of before go."""
    shelf = life.shelf
    state = shelf.machine.capture()
    (info,) = shelf.snapshots.infos()
    shelf.snapshots.write(info.meta, {}, state.batches(), renew=True)
    del state
    assert shelf.machine.collect(shelf.snapshots.kept) > 0


def start(life: Life) -> None:
    """Over what a crash in the middle of everything has left."""
    life.open()


def littered(seed: int) -> Life:
    life = merged(seed)
    life.apply(7)
    life.end = 7
    life.files.lose_power_at = life.files.operations + 8  # One file is whole, another is not.
    with contextlib.suppress(DiskCrash):
        life.shelf.snapshot()
    life.files.crash(survives=True)
    return life


def receive(life: Life, info: SnapshotInfo | None, ref: FileRef | None, **more: Any) -> ReceiveJob:
    """Fetch one file, piece by piece, as `marble.fetching` has it done."""
    source = peer()

    def run(pieces: list[Any]) -> ReceiveJob:
        job = ReceiveJob(life.shelf.snapshots, info, ref, pieces, **more)
        job.run()
        if job.error is not None:
            raise job.error
        return job

    job = run([])
    while not (job.arrived or job.complete or job.missing):
        if ref is None:
            assert info is not None
            data = source.snapshots.piece(info, job.offset, PIECE_BYTES)
        else:
            data = source.snapshots.contents.piece(ref.key, job.offset, PIECE_BYTES)
        job = run([(job.offset, memoryview(data))])
    return job


def fetch(life: Life, **more: Any) -> SnapshotInfo:
    info = peer().snapshots.newest()
    assert info is not None
    while not (job := receive(life, info, None, **more)).complete:
        assert life.lacks is None or {ref.name for ref in job.missing} <= life.lacks
        for ref in job.missing:
            try:
                receive(life, info, ref, **more)
            except CorruptionError:
                # It went on from what the crash had left of it, and that was at fault: it is thrown away, and fetched whole.
                receive(life, info, ref, **more)
    return info


def install(life: Life) -> None:
    """A snapshot of another node, of which some files are here, takes the place of everything."""
    shelf, info = life.shelf, fetch(life)
    shelf.machine.restore(info.index, shelf.snapshots.read(info))
    shelf.snapshots.prune(info.index)
    assert shelf.machine.collect(shelf.snapshots.kept) >= 0
    life.end = info.index


def lagging(seed: int) -> Life:
    life = merged(seed)
    have, theirs = life.shelf.snapshots.kept(), peer().snapshots.kept()
    assert have & theirs, "nothing of it would be spared"
    life.lacks = theirs - have
    return life


def damaged(seed: int) -> Life:
    """A file that the peer has, too, has lost a bit of its first block."""
    life = with_snapshots(seed)
    machine = life.shelf.machine
    ref = next(ref for ref in machine.live() if ref.name in peer().store.files.names())
    life.files.flip_bit(life.shelf.store.files.path(ref.name), 8 * 400)
    life.open()
    with contextlib.suppress(CorruptionError):
        facts(life.shelf.machine)
    assert life.shelf.machine.damaged() == [ref]
    life.damaged = ref
    return life


def heal(life: Life) -> None:
    machine = life.shelf.machine
    assert receive(life, None, life.damaged, healed=machine.healed).arrived
    assert machine.damaged() == []
    life.check()


def check_healed(life: Life) -> None:
    """It is damaged yet, and says so, or it is whole; and can be healed in either case."""
    try:
        life.check()
    except CorruptionError:
        assert life.shelf.machine.damaged() == [life.damaged]
        heal(life)


def rebuild(life: Life) -> None:
    """The machine is built from the peer's snapshot, which does not become one of this node, and then writes its own."""
    shelf = life.shelf
    shelf.snapshots.contents.blame([ref.name for ref in shelf.machine.damaged()])
    info = fetch(life, keep=False, healed=shelf.machine.healed)
    shelf.machine.rebuild(info.index, shelf.snapshots.received(info), [])
    shelf.snapshots.discard_partial()
    shelf.snapshot()
    assert shelf.machine.damaged() == []
    life.end = info.index


def check_rebuilt(life: Life) -> None:
    try:
        life.check()
    except CorruptionError:
        assert life.shelf.machine.damaged() == [life.damaged]
        rebuild(life)
        life.check()


_FILE = {"create table.tmp", "write table.tmp", "sync table.tmp", "rename table", "sync_directory directory"}
_SNAPSHOT = {
    "create snapshot.tmp",
    "write snapshot.tmp",
    "sync snapshot.tmp",
    "rename snapshot",
    "sync_directory directory",
}
_FETCHED = {
    "create table.tmp",
    "rename table.part",
    "write table.tmp",
    "sync table.tmp",
    "rename table",
    "sync_directory directory",
}
_FETCHED_SNAPSHOT = {"create snapshot.tmp", "rename snapshot.part", "write snapshot.tmp", "sync snapshot.tmp"}

Procedure = tuple[Callable[[int], Life], Callable[[Life], Any], Callable[[Life], None], set[str]]

PROCEDURES: Final[dict[str, Procedure]] = {
    "flush and snapshot": (with_more, snapshot, Life.check, {*_FILE, *_SNAPSHOT, "remove snapshot"}),
    "compaction": (with_snapshots, compact, Life.check, _FILE),
    "renewal and removal": (merged, collect, Life.check, {*_SNAPSHOT, "remove table"}),
    "start": (littered, start, Life.check, {"remove table.tmp", "remove table", "sync_directory directory"}),
    "snapshot of another node": (
        lagging,
        install,
        Life.check,
        {*_FETCHED, *_FETCHED_SNAPSHOT, "rename snapshot", "remove snapshot", "remove table"},
    ),
    "healing": (damaged, heal, check_healed, _FETCHED),
    "rebuilding": (
        damaged,
        rebuild,
        check_rebuilt,
        {*_FETCHED, *_FETCHED_SNAPSHOT, *_SNAPSHOT, "remove snapshot.part"},
    ),
}


@pytest.mark.parametrize("name", PROCEDURES)
def test_power_lost_at_every_operation(name: str) -> None:
    prepare, run, check, named = PROCEDURES[name]
    life = prepare(0)
    begun = len(life.files.trace)
    run(life)
    kinds = set(life.files.trace[begun:])
    count = len(life.files.trace) - begun
    assert named <= kinds, "what is named above is done"
    life.check()
    interrupted = set()
    for operation in range(1, count + 1):
        for survives in (False, True, None):
            life = prepare(operation)
            life.files.lose_power_at = life.files.operations + operation
            with pytest.raises(DiskCrash):
                run(life)
            interrupted.add(life.files.trace[-1])
            life.files.crash(survives)
            life.open()
            check(life)
            # What it has shown it keeps.
            found = facts(life.shelf.machine)
            life.files.crash(survives=False)
            life.open()
            life.apply(found[0])
            assert facts(life.shelf.machine) == found
    assert interrupted == kinds


@pytest.mark.parametrize("name", PROCEDURES)
def test_the_disk_fails_at_every_operation(name: str) -> None:
    """The procedure gives up, nothing is lost by it, and it can be done again."""
    prepare, run, check, _ = PROCEDURES[name]
    life = prepare(0)
    begun = life.files.operations
    run(life)
    for operation in range(1, life.files.operations - begun + 1):
        life = prepare(operation)
        life.files.fail_at = life.files.operations + operation
        with contextlib.suppress(OSError):
            run(life)
        life.files.fail_at = None
        life.open()
        check(life)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@cache
def directory() -> SimulatedFiles:
    """A node's: a log of several segments, a snapshot, files of tables."""
    ring = Ring(1, machine=eager)
    ring.create()
    ring.write(45)
    ring[1].files.put(IDENTITY_FILE, seal({"format": 1, "cluster_id": "ring", "node_id": 1, "voters": [1]}))
    ring[1].log.close()
    return ring[1].files


def opened(operation: int) -> tuple[Traced, Log, SnapshotStore]:
    files = directory().copy()
    files.__class__, files.trace = Traced, []  # type: ignore[attr-defined]
    files._random = SystemRandom(operation)
    store = SnapshotStore(files, 0)
    return files, Log.open(files, LogOptions(segment_bytes_max=4096)), store  # type: ignore[return-value]


def below(files: SimulatedFiles, folder: str) -> SimulatedFiles:
    found = SimulatedFiles(SystemRandom(0))
    for path in list(files._names):
        if path.startswith(f"{folder}/"):
            found.put(path.removeprefix(f"{folder}/"), files.read(path))
    return found


def is_whole(files: SimulatedFiles) -> bool:
    """Whether there is a checkpoint; and if so, it is sound."""
    try:
        listed = read_manifest(files)
    except (FileNotFoundError, CorruptionError):
        return False
    found = verify(files)
    assert found.sound, found.findings
    assert len(listed) == found.files - 1
    return True


def test_power_lost_at_every_operation_of_a_checkpoint() -> None:
    target = f"{CHECKPOINTS}/one"
    files, log, store = opened(0)
    begun = len(files.trace)
    write_checkpoint(files, log, [store], target)
    kinds, count = set(files.trace[begun:]), len(files.trace) - begun
    links = {kind.split(" ")[1] for kind in kinds if kind.startswith("link ")}
    assert {path.split("/")[2] for path in links} == {"log", "snapshots", "tables"}
    assert f"write {target}/{MANIFEST}" in kinds
    assert is_whole(below(files, target))
    log.close()
    outcomes, interrupted = set(), set()
    for operation in range(1, count + 1):
        for survives in (False, True, None):
            files, log, store = opened(operation)
            files.lose_power_at = files.operations + operation
            with pytest.raises(DiskCrash):
                write_checkpoint(files, log, [store], target)
            interrupted.add(files.trace[-1])
            files.crash(survives)
            outcomes.add(is_whole(below(files, target)))
            files.remove_tree(CHECKPOINTS)  # As a start does.
            # The log's mark is evidence only, and never synced.
            lost = [each for each in verify(files).findings if each.damage and not each.path.endswith("log/SYNCED")]
            assert lost == [], "the node itself has lost nothing"
    assert interrupted == kinds
    assert outcomes == {False, True}


def test_the_disk_fails_at_every_operation_of_a_checkpoint() -> None:
    files, log, store = opened(0)
    begun = files.operations
    Checkpoints(files, log, [store]).make()
    for operation in range(1, files.operations - begun + 1):
        files, log, store = opened(operation)
        checkpoints = Checkpoints(files, log, [store])
        files.fail_at = files.operations + operation
        with contextlib.suppress(OSError):
            checkpoints.make()
            continue
        files.fail_at = None
        assert not [path for path in files._names if path.startswith(f"{CHECKPOINTS}/")]
        name, _ = checkpoints.make()
        assert is_whole(below(files, f"{CHECKPOINTS}/{name}"))
