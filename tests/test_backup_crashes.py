"""Backups and restores on a simulated disk: power lost, the disk failing, full, and losing bits at every one of their operations.

Invariants, after whatever befell it:

- What is called as the user said is whole: it verifies, and holds what the source held, to the row.
- What is not is believed by nobody: no node, restore or backup takes it, and `verify` calls it damaged; or else it is whole, too.
- The source is as it was. The same call, made again, succeeds, unless the first one did, and then it is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import cache
from random import Random
from typing import Any, Final

import pytest
from lsm.shelf import Noting
from node.ring import Ring
from node.test_rebuilding import eager

from marble.archive import UNFINISHED, Source, back_up_directory, back_up_node, restore_directory
from marble.checkpoint import Checkpoints
from marble.env import Files
from marble.errors import CorruptionError, ProtocolError, UnavailableError, UsageError
from marble.identity import IDENTITY_FILE, bind, make_identity
from marble.logstore.log import Log, LogOptions
from marble.logstore.snapshots import SnapshotStore
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.recovery import recover
from marble.snapshotting import SnapshotPolicy
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.types import Members
from marble.verify import verify

WRITES: Final = 33
DATA: Final = "data"
"""The source."""
NEW: Final = "new"
"""What is made."""


class Faulty(Noting):
    """A disk on which something may befall any operation."""

    def __init__(self, seed: int) -> None:
        super().__init__(Random(seed))
        self.trace: list[str] = []
        self.before: Callable[[], None] | None = None
        """Called before each operation."""

    def note(self, what: str, path: str) -> None:
        self.trace.append(f"{what} {path.rpartition('/')[0]}")
        if self.before is not None:
            self.before()


# -- what there is -----------------------------------------------------------------------------------------------------


@cache
def ring() -> Ring:
    """A node that runs: a log of several segments, snapshots, tables in files, and some that are in memory yet."""
    found = Ring(1, machine=eager, policy=SnapshotPolicy(distance=9, tail=3))
    make_identity(found[1].files, "old", 1, (1,), Random(1))
    found.create()
    found.write(WRITES)
    return found


@cache
def directory() -> SimulatedFiles:
    """The same after it was killed."""
    return ring()[1].files.copy()


@cache
def backup() -> SimulatedFiles:
    disk = Faulty(1)
    put(disk, directory(), DATA)
    back_up_directory(disk.below(DATA), disk, NEW, str)
    found = SimulatedFiles(Random(1))
    for path in [path for path in disk._names if path.startswith(f"{NEW}/")]:
        found.put(path.removeprefix(f"{NEW}/"), disk.read(path))
    return found


def put(disk: SimulatedFiles, files: SimulatedFiles, folder: str) -> None:
    for path in files._names:
        disk.put(f"{folder}/{path}", files.read(path))


class Node:
    """The running node, as the one who fetches a backup sees it."""

    name = "node 1"

    def __init__(self, fails_at: int = 0) -> None:
        peer = ring()[1]
        self._checkpoints = Checkpoints(peer.files, peer.log, list(peer.stores.values()))
        self._token = ""
        self._fails_at = fails_at
        self.asked = 0

    def _ask(self) -> None:
        self.asked += 1
        if self.asked == self._fails_at:
            raise UnavailableError("node 1 does not answer")

    def begin(self) -> Mapping[str, object]:
        self._ask()
        self._token, listed = self._checkpoints.make()
        return listed

    def read(self, path: str, offset: int, bytes_max: int) -> bytes:
        self._ask()
        return self._checkpoints.read(self._token, path, offset, min(bytes_max, 3000))

    def end(self) -> None:
        self._checkpoints.drop(self._token)


def content(files: Files) -> tuple[int, Any]:
    """What a node that opens this directory comes to have: all entries of its log."""
    log = Log.open(files, LogOptions(cache_bytes_max=0))
    machine = TableMachine(files=TableFiles(files, 0))
    state = log.groups[0]
    recovered = recover(0, state, SnapshotStore(files, 0), Members((1,)), machine)
    first = recovered.state.applied_index + 1
    if first <= state.last_index:
        machine.apply(log.read(0, first, state.last_index + 1))
    log.close()
    return machine.applied_index, {
        info.name: machine.read(info.id).scan().read_all().to_pylist() for info in machine.tables()
    }


@cache
def expected() -> tuple[int, Any]:
    found = content(directory().copy())
    assert sum(map(len, found[1].values())) == WRITES
    return found


# -- procedures --------------------------------------------------------------------------------------------------------


def of_directory(seed: int) -> Faulty:
    disk = Faulty(seed)
    put(disk, directory(), DATA)
    return disk


def of_backup(seed: int) -> Faulty:
    disk = Faulty(seed)
    put(disk, backup(), DATA)
    return disk


def of_leftovers(seed: int) -> Faulty:
    """Beside what is left of an earlier call, which was whole but for its name."""
    disk = of_directory(seed)
    copy(disk)
    disk.rename(NEW, NEW + UNFINISHED)
    disk.sync_directory("")
    assert verify(disk.below(NEW + UNFINISHED)).sound
    disk.trace, disk.operations, disk.reads = [], 0, 0
    return disk


def copy(disk: SimulatedFiles) -> None:
    back_up_directory(disk.below(DATA), disk, NEW, str)


def fetch(disk: SimulatedFiles, node: Source | None = None) -> None:
    back_up_node(node or Node(), disk, NEW, str)


def restored(disk: SimulatedFiles, source: str = DATA, target: str = NEW) -> None:
    restore_directory(disk.below(source), disk, target, "other", {3: "a:1", 4: "b:1"}, 4, str, Random(7))


_MADE = {f"{NEW}{UNFINISHED}{folder}" for folder in ("", "/log", "/snapshots", "/tables")}
PROCEDURES: Final[dict[str, tuple[Callable[[int], Faulty], Callable[[SimulatedFiles], None], set[str]]]] = {
    "backup of a directory": (of_directory, copy, {f"{what} {path}" for path in _MADE for what in ("create", "sync")}),
    "backup of a node": (Faulty, fetch, {f"{what} {path}" for path in _MADE for what in ("create", "sync")}),
    "restore of a backup": (of_backup, restored, {f"sync_directory {NEW}{UNFINISHED}", "rename "}),
    "restore of a directory": (of_directory, restored, {"rename "}),
    "backup beside an unfinished one": (of_leftovers, copy, {f"remove {path}" for path in _MADE}),
}


def is_whole(disk: SimulatedFiles, name: str) -> bool:
    """Whether somebody would believe what is called so; and then it is right."""
    disk = disk.copy()
    files = disk.below(name)
    if not verify(files).sound:
        with pytest.raises((UsageError, CorruptionError)):
            again(files, disk, "third", str)
        assert not disk.exists("third")
        with contextlib.suppress(UsageError, CorruptionError):
            # It may lack nothing but its manifest, which a backup does not need.
            back_up_directory(files, disk, "third", str)
            assert content(disk.below("third")) == expected()
        if files.exists("log") and not files.exists(IDENTITY_FILE):
            # A node does not begin in it either.
            with pytest.raises(CorruptionError, match="no identity"):
                bind(files, "other", 4, (3, 4))
        return False
    if name != NEW:
        again(files, disk, "third", str)
        assert content(disk.below("third"))[1] == expected()[1]
    assert content(files)[1] == expected()[1]
    return True


def again(files: Files, disk: SimulatedFiles, name: str, told: Callable[[str], object]) -> None:
    restore_directory(files, disk, name, "third", {}, None, told, Random(8))


def is_there(disk: SimulatedFiles, name: str) -> bool:
    return disk.exists(name) and bool(disk.list(name))


def check(disk: Faulty, run: Callable[[SimulatedFiles], None]) -> None:
    """The invariants, at the head of this file."""
    disk.before = None
    if disk.exists(DATA):
        assert verify(disk.below(DATA)).sound
    if is_there(disk, NEW + UNFINISHED):
        is_whole(disk, NEW + UNFINISHED)
    if is_there(disk, NEW):
        assert is_whole(disk, NEW)
        with pytest.raises(UsageError, match="exists already"):
            run(disk)
        return
    run(disk)
    assert not is_there(disk, NEW + UNFINISHED)
    disk.crash(survives=False)
    assert is_whole(disk, NEW)


@pytest.mark.parametrize("name", PROCEDURES)
def test_power_lost_at_every_operation(name: str) -> None:
    prepare, run, named = PROCEDURES[name]
    disk = prepare(0)
    run(disk)
    kinds, count = set(disk.trace), len(disk.trace)
    assert named <= kinds, "what is named above is done"
    disk.crash(survives=False)
    assert is_whole(disk, NEW)
    again(disk.below(NEW), disk, "third", str)
    assert content(disk.below("third"))[1] == expected()[1]
    interrupted = set()
    for operation in range(1, count + 1):
        for survives in (None, bool(operation % 2)):
            disk = prepare(operation)
            disk.lose_power_at = operation
            with pytest.raises(DiskCrash):
                run(disk)
            interrupted.add(disk.trace[-1])
            disk.crash(survives)
            check(disk, run)
    assert interrupted == kinds


@pytest.mark.parametrize("name", PROCEDURES)
def test_the_disk_fails_at_every_operation(name: str) -> None:
    prepare, run, _ = PROCEDURES[name]
    disk = prepare(0)
    run(disk)
    for operation in range(1, disk.operations + 1):
        disk = prepare(operation)
        disk.fail_at = operation
        with pytest.raises(OSError, match="simulated failure"):
            run(disk)
        if operation % 2:
            disk.crash()
        disk.fail_at = None
        check(disk, run)


@pytest.mark.parametrize("name", PROCEDURES)
def test_the_disk_is_full_from_any_operation_on(name: str) -> None:
    prepare, run, _ = PROCEDURES[name]
    disk = prepare(0)
    run(disk)
    for operation in range(1, len(disk.trace) + 1):
        disk = prepare(operation)

        def fill(disk: Faulty = disk, operation: int = operation) -> None:
            disk.full = len(disk.trace) >= operation

        disk.before = fill
        with contextlib.suppress(OSError):
            run(disk)
        disk.before, disk.full = None, False
        check(disk, run)


@pytest.mark.parametrize("name", PROCEDURES)
def test_any_read_fails(name: str) -> None:
    prepare, run, _ = PROCEDURES[name]
    disk = prepare(0)
    before = disk.reads
    run(disk)
    for read in range(before + 1, disk.reads + 1):
        disk = prepare(read)
        disk.fail_read_at = read
        with pytest.raises((OSError, CorruptionError)):
            run(disk)
        assert not is_there(disk, NEW)
        disk.fail_read_at = None
        if read % 8 == 0:
            check(disk, run)


@pytest.mark.parametrize("name", PROCEDURES)
def test_a_bit_is_lost_at_any_operation(name: str) -> None:
    """Of what is being made, or of what it is made from: it is found, by the procedure or whoever verifies, or it changes nothing."""
    prepare, run, _ = PROCEDURES[name]
    disk = prepare(0)
    run(disk)
    for operation in range(1, len(disk.trace) + 1):
        disk, chance = prepare(operation), Random(operation)

        def flip(disk: Faulty = disk, chance: Random = chance, operation: int = operation) -> None:
            paths = sorted(path for path, node in disk._names.items() if node.seen)
            if len(disk.trace) == operation and paths:
                path = chance.choice(paths)
                disk.flip_bit(path, chance.randrange(8 * disk.size(path)))

        disk.before = flip
        with contextlib.suppress(CorruptionError, UsageError):
            run(disk)
        disk.before = None
        for made in (NEW, NEW + UNFINISHED):
            if is_there(disk, made) and verify(disk.below(made)).sound:
                assert content(disk.copy().below(made))[1] == expected()[1]


def test_a_node_that_stops_to_answer_leaves_nothing() -> None:
    node = Node()
    disk = Faulty(0)
    fetch(disk, node)
    for number in range(1, node.asked + 1):
        disk = Faulty(number)
        with pytest.raises(UnavailableError):
            fetch(disk, Node(number))
        assert disk.list("") == []
        check(disk, fetch)


class Liar(Node):
    def __init__(self, listed: dict[str, object], data: bytes) -> None:
        super().__init__()
        self._listed, self._data = listed, data

    def begin(self) -> Mapping[str, object]:
        return self._listed

    def read(self, path: str, offset: int, bytes_max: int) -> bytes:
        return self._data


@pytest.mark.parametrize(
    ("listed", "data", "error"),
    [
        ({}, b"", ProtocolError),
        ({IDENTITY_FILE: 1 << 40}, b"x", ProtocolError),
        ({IDENTITY_FILE: 5}, b"", ProtocolError),
        ({IDENTITY_FILE: 5}, b"123456", ProtocolError),
        ({IDENTITY_FILE: 5}, b"12345", CorruptionError),
        ({IDENTITY_FILE: 5, "log/../../x": 1}, b"12345", CorruptionError),
    ],
)
def test_a_node_that_gives_nonsense(listed: dict[str, object], data: bytes, error: type[Exception]) -> None:
    disk = Faulty(0)
    with pytest.raises(error):
        fetch(disk, Liar(listed, data))
    assert disk.list("") == []
