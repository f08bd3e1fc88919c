"""Backups that are taken of nodes while they work, restored, and looked at: by the production code, on simulated disks of their own.

A backup takes its time: between any two of its reads the cluster goes on, purges, compacts, crashes, and the node may be gone. Its own
disk may lose power, fail, or lose a bit, at any operation of the backup and of the restore.

Rule 1: what has its name is whole. It verifies, unless its own disk has lost a bit; its log is what was committed, and perhaps more
behind that; it holds all that its node had applied before it was begun; and its tables are the model's.
Rule 2: what was interrupted is whole likewise, or `verify` calls it damaged.
Rule 3: what is restored is of a cluster of its own: nobody has voted in it, all in its log is committed, nothing there changes its members.
Rule 4: there is none for a reason only: the node is gone, or a disk has failed or was damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from marble.archive import UNFINISHED, back_up_node, restore_directory
from marble.checkpoint import Checkpoints
from marble.driver import Driver
from marble.env import Files
from marble.errors import CorruptionError, UnavailableError
from marble.logstore.log import Log, LogOptions
from marble.logstore.snapshots import SnapshotStore
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.recovery import recover
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.testing.ledger import Ledger, Violation
from marble.testing.node import SimulatedNode
from marble.testing.world import World
from marble.types import HardState, Members
from marble.verify import Verified, verify

PIECE_BYTES_MAX: Final = 6000
"""Small, so that a backup is fetched in many pieces."""

EVENTS_MAX: Final = 25
"""So many things may happen in the cluster between two pieces."""

OPERATIONS_MAX: Final = 90
"""About as many operations a backup or a restore has."""

BACKUP: Final = "backup"
RESTORED: Final = "restored"


class Backups:
    """Takes one backup after the other; see the head of this module."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._loop = world.loop
        self._busy = False

    def take(self, node: SimulatedNode) -> None:
        """Take a backup of `node`, if it runs, and restore it. Time goes on meanwhile."""
        if self._busy or not node.alive:
            return
        self._busy = True
        try:
            self._take(node)
        finally:
            self._busy = False

    def _take(self, node: SimulatedNode) -> None:
        loop, disk = self._loop, _Disk(self._world, node)
        source = _Source(self._world, node, disk)
        self._world.injected["backups begun"] += 1
        made = disk.attempt(lambda: back_up_node(source, disk.files, BACKUP, _tell_nobody))
        loop.note(node.id, "a backup of it {}", "is there" if made else "came to nothing")
        self._check(disk, BACKUP, source.applied, node)
        if not made:
            return
        if not disk.files.exists(BACKUP):
            raise Violation(f"the backup of node {node.id} was made, and did not survive a loss of power")
        self._world.injected["backups"] += 1
        places = {number: f"new-{number}:1" for number in range(1, loop.between(0, 3) + 1)}
        files = disk.files.below(BACKUP)
        made = disk.attempt(
            lambda: restore_directory(files, disk.files, RESTORED, "restored", places, None, _tell_nobody, loop.random)
        )
        self._world.injected["backups restored"] += made
        self._check(disk, RESTORED, source.applied, node)
        if made and not disk.flipped:
            _check_cluster(verify(disk.files.below(RESTORED)), Members(tuple(places or (1,))))
        self._check(disk, BACKUP, source.applied, node)

    def _check(self, disk: _Disk, name: str, applied: Mapping[int, int], node: SimulatedNode) -> None:
        """Rules 1 and 2."""
        for made in (name, name + UNFINISHED):
            if not disk.files.exists(made) or not disk.files.list(made):
                continue
            files = disk.files.below(made)
            found = verify(files)
            if found.sound:
                for group, ledger in self._world.ledgers.items():
                    self._check_group(files, group, ledger, applied.get(group, 0), f"{made} of node {node.id}")
            elif made == name and not disk.flipped:
                raise Violation(f"{made} of node {node.id} is there, and damaged: {found.findings[0]}")

    def _check_group(self, files: Files, group: int, ledger: Ledger, applied: int, who: str) -> None:
        log = Log.open(files, LogOptions(cache_bytes_max=0), writable=False)
        state = log.groups.get(group)
        machine = TableMachine(files=TableFiles(files, group))
        first = recover(group, state, SnapshotStore(files, group), Members((1,)), machine).state.applied_index + 1
        last = max(first - 1, 0 if state is None else state.last_index)
        if last < applied:
            raise Violation(
                f"{who} ends with entry {last} of group {group}, and {applied} were applied before it was begun"
            )
        model = self._world.models[group]
        known = min(last, model.index)
        for index in range(first, known + 1):
            assert state is not None
            if state.term_index.term_at(index) != ledger.committed[index - 1]:
                # Those at the end were not committed, and others took their places.
                known = index - 1
                break
        if known < applied:
            raise Violation(f"{who}: entry {known + 1} of group {group} is another than was committed")
        if first <= known:
            machine.apply(log.read(group, first, known + 1))
        if machine.applied_index:
            model.check(machine, who)
        if known < last:
            # They take effect all the same.
            machine.apply(log.read(group, known + 1, last + 1))
        log.close()


def _check_cluster(found: Verified, members: Members) -> None:
    """Rule 3."""
    for group, state in found.groups.items():
        last = max(state.last_index, state.purged_index)
        wanted = HardState(state.term_index.term_at(last) if last else 0, 0, last)
        if state.hard_state != wanted or state.changes:
            raise Violation(
                f"group {group} was restored with {state.hard_state}, not {wanted}, and changes of members at {state.changes}"
            )
        for info in found.snapshots.get(group, []):
            if info.members != members:
                raise Violation(f"group {group} was restored with a snapshot of members {info.members}, not {members}")


def _tell_nobody(path: str) -> None:
    pass


class _Disk:
    """Where backups go."""

    def __init__(self, world: World, node: SimulatedNode) -> None:
        self.world = world
        self.node = node
        self.files = SimulatedFiles(world.loop.random)
        self.flipped = False
        """A bit of it was."""

    def attempt(self, action: Callable[[], object]) -> bool:
        """Do `action`, with or without a fault. Whether it did not end early. Rule 4."""
        loop, files = self.world.loop, self.files
        if loop.chance(0.3):
            files.lose_power_at = files.operations + loop.between(1, OPERATIONS_MAX)
        elif loop.chance(0.2):
            files.fail_at = files.operations + loop.between(1, OPERATIONS_MAX)
        elif loop.chance(0.1):
            files.fail_read_at = files.reads + loop.between(1, OPERATIONS_MAX)
        try:
            action()
        except DiskCrash:
            self.world.injected["backups interrupted"] += 1
            files.crash()
            return False
        except UnavailableError:
            self.world.injected["backups given up"] += 1
            return False
        except OSError:
            self.world.injected["backups failed"] += 1
            return False
        except CorruptionError:
            # Read back wrong, or copied from what was damaged there: a disk that fails to read looks alike.
            if not self.flipped and not self.node.damaged and not self.node.tables.was_harmed and not _failed(files):
                raise
            self.world.injected["backups refused"] += 1
            return False
        finally:
            if loop.chance(0.2):
                files.crash()
            files.lose_power_at = files.fail_at = files.fail_read_at = None
        return True

    def flip(self) -> None:
        """Lose a bit of what is there so far."""
        paths = [path for path in sorted(self.files._names) if self.files.size(path)]
        if paths:
            path = paths[self.world.loop.between(0, len(paths) - 1)]
            self.files.flip_bit(path, self.world.loop.between(0, 8 * self.files.size(path) - 1))
            self.flipped = True


def _failed(files: SimulatedFiles) -> bool:
    """Whether a read has failed, which `verify` calls damage."""
    return files.fail_read_at is not None and files.reads >= files.fail_read_at


class _Source:
    """A node, as the one who takes a backup of it sees it."""

    def __init__(self, world: World, node: SimulatedNode, disk: _Disk) -> None:
        self.name = f"node {node.id}"
        self.applied: dict[int, int] = {}
        self._world = world
        self._loop = world.loop
        self._node = node
        self._life = node.life
        self._disk = disk
        self._token = ""
        self._checkpoints: Checkpoints | None = None

    def begin(self) -> Mapping[str, object]:
        made: list[Mapping[str, object]] = []
        node = self._node

        def make(driver: Driver) -> None:
            applied = {group: seat.machine.applied_index for group, seat in node.seats.items()}
            assert node.checkpoints is not None
            try:
                self._token, listed = node.checkpoints.make()
            except (OSError, CorruptionError) as error:
                # The one who asks is told, and the node goes on.
                self._loop.note(node.id, "cannot make a checkpoint: {}", error)
                return
            self.applied, self._checkpoints = applied, node.checkpoints
            made.append(listed)

        node.act(0, make)
        if not made:
            raise UnavailableError(f"{self.name} makes no checkpoint")
        return made[0]

    def read(self, path: str, offset: int, bytes_max: int) -> bytes:
        for _ in range(self._loop.between(0, EVENTS_MAX)):
            self._loop.step()
        if self._loop.chance(0.004):
            self._disk.flip()
        if self._node.life != self._life or self._checkpoints is None:
            raise UnavailableError(f"{self.name} is gone")
        return self._checkpoints.read(self._token, path, offset, min(bytes_max, self._loop.between(1, PIECE_BYTES_MAX)))

    def end(self) -> None:
        checkpoints = self._checkpoints
        if self._node.life == self._life and checkpoints is not None:
            self._node.act(0, lambda driver: checkpoints.drop(self._token))
