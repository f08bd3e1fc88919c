"""A disk in memory that forgets, tears and lies as disks and page caches do, on a seeded schedule.

What it models, and where it was seen:

- What no sync covered may survive a power loss wholly, as a prefix, or with holes: any subset of its 512-byte
  sectors, the others as zeros or as stale bytes of some other file (ALICE, OSDI'14).
- Creations, renames and removals survive in any subset until the directory is synced; a rename is all or nothing.
  (A sync of a directory that failed can be repeated: file systems stop for good when their journal fails.)
- What was written over blocks that the file had already survives in any subset of its sectors, too: the others keep
  what was there before.
- A sync that fails leaves the data readable and marks it clean: a further sync succeeds and writes nothing ("Can
  Applications Recover from fsync Failures?", ATC'20).
- `SimulatedFiles.flip_bit` for what the medium does by itself.

A power loss at the n-th operation is `SimulatedFiles.lose_power_at`; a killed process needs nothing: open another log
on the same files.
"""

from __future__ import annotations

import contextlib
import copy
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from marble.env import Random
from marble.errors import UnavailableError
from marble.testing.subtree import Subtree

SECTOR_BYTES: Final = 512
_TAKES_SPACE: Final = frozenset({"write", "create", "overwrite", "link"})


class DiskCrash(BaseException):
    """The machine is off. Not an Exception, so that nothing under test handles it."""


@dataclass(slots=True)
class _Node:
    """A file: what reads see, what the medium holds, and the writes (offset, bytes) between the two, in order."""

    seen: bytearray = field(default_factory=bytearray)
    stored: bytearray = field(default_factory=bytearray)
    dirty: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        _splice(self.seen, offset, data)
        self.dirty.append((offset, data))

    def sync(self) -> None:
        """Write back what is dirty, and only that: what a failed sync has marked clean stays unwritten."""
        for offset, data in self.dirty:
            _splice(self.stored, offset, data)
        self.dirty.clear()


@dataclass(frozen=True, slots=True)
class _NameChange:
    """``target`` is to mean ``node`` (None: nothing), and ``source``, if given, nothing any more."""

    directory: str
    target: str
    node: _Node | None
    source: str | None = None

    def apply(self, names: dict[str, _Node]) -> None:
        if self.source is not None:
            names.pop(self.source, None)
        if self.node is None:
            names.pop(self.target, None)
        else:
            names[self.target] = self.node


@dataclass(frozen=True, slots=True)
class _TreeChange:
    """The directory ``source`` is to be called ``target``, with all that is in it by then."""

    directory: str
    target: str
    source: str

    def apply(self, names: dict[str, _Node]) -> None:
        for name in [name for name in names if name.startswith(f"{self.source}/")]:
            names[self.target + name.removeprefix(self.source)] = names.pop(name)

    def moved(self, change: _NameChange) -> _NameChange:
        """`change`, if it is one in the tree, as one that is not durable yet where the tree is durably now."""
        inside = change.directory == self.source or change.directory.startswith(f"{self.source}/")
        if not inside:
            return change
        source = None if change.source is None else self.target + change.source.removeprefix(self.source)
        directory, target = (self.target + path.removeprefix(self.source) for path in (change.directory, change.target))
        return _NameChange(directory, target, change.node, source)


class SimulatedAppendFile:
    """An `marble.env.AppendFile` of `SimulatedFiles`."""

    def __init__(self, files: SimulatedFiles, path: str, node: _Node, size: int) -> None:
        self._files = files
        self._path = path
        self._node = node
        self._size = size
        self._life = files.life

    @property
    def size(self) -> int:
        return self._size

    @property
    def room(self) -> int:
        return len(self._node.seen) - self._size

    def write(self, data: bytes | memoryview, zeros: int = 0) -> None:
        self._check_alive()
        copied = bytes(data) + bytes(min(zeros, max(0, self.room - len(data))) if self._files.full else zeros)
        with self._files.operation("write" if len(data) > self.room else "write over", self._path) as failing:
            # A write that fails has come some way nevertheless.
            self._node.write(self._size, copied[: len(copied) // 2] if failing else copied)
        self._size += len(data)

    def sync(self) -> None:
        self._check_alive()
        self._files.sync_node(self._path, self._node)

    def close(self) -> None:
        """Nothing to give back."""

    def _check_alive(self) -> None:
        if self._life != self._files.life:
            raise DiskCrash("a file that was opened before the power was lost")


class SimulatedFiles:
    """A `marble.env.Files` in memory. One thread at a time.

    - ``operations`` counts everything that changes the disk or syncs it, so that a test can lose power at each of
      them in turn; ``reads`` counts reads and mappings.

    Parameters
    ----------
    random
        Decides what a power loss leaves. The same seed and calls give the same disk.
    """

    def __init__(self, random: Random) -> None:
        self.operations = 0
        self.life = 0
        self.lose_power_at: int | None = None
        self.fail_at: int | None = None
        self.reads = 0
        self.fail_read_at: int | None = None
        self.full = False
        """No space is left: what makes a file longer fails half way, and no file can be created. All else goes on."""
        self._random = random
        self._off = False
        self._directories = {""}
        self._names: dict[str, _Node] = {}
        self._stored_names: dict[str, _Node] = {}
        self._changes: list[_NameChange | _TreeChange] = []
        self._locked: set[str] = set()

    # -- faults ------------------------------------------------------------------------------------------------------

    def crash(self, survives: bool | None = None) -> None:
        """Lose the power and come back: from here on, reads see only what the medium kept.

        Of what no sync has covered that is everything if `survives`, nothing if it is False, and any part of it if it is None.
        """
        for change in self._changes:
            if self._random.randrange(0, 2) if survives is None else survives:
                change.apply(self._stored_names)
            elif isinstance(change, _TreeChange):
                self._move_directories(change.target, change.source)
        for node in {id(node): node for node in (*self._names.values(), *self._stored_names.values())}.values():
            if survives:
                node.sync()
            elif survives is None:
                self._tear(node)
            node.dirty.clear()
            node.seen = bytearray(node.stored)
        self._names = dict(self._stored_names)
        self._changes.clear()
        self._locked.clear()
        self.life += 1
        self.lose_power_at, self.fail_at, self.fail_read_at, self._off = None, None, None, False

    def flip_bit(self, path: str, bit: int) -> None:
        """Flip bit `bit` of the file, counted from its first byte's lowest."""
        node = self._node(path)
        for data in (node.seen, node.stored):
            if bit // 8 < len(data):
                data[bit // 8] ^= 1 << bit % 8

    def unmap(self, path: str) -> None:
        """From here on, who has mapped the file sees the bytes that there are now, whatever becomes of it: pages that were read."""
        node = self._node(path)
        node.seen = bytearray(node.seen)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """What is read meanwhile is read by nobody who is simulated: it neither fails nor counts."""
        kept, self.fail_read_at, reads = self.fail_read_at, None, self.reads
        try:
            yield
        finally:
            self.fail_read_at, self.reads = kept, reads

    def cut(self, path: str, size: int) -> None:
        """Shorten the file as no program of ours would."""
        node = self._node(path)
        node.sync()
        node.seen, node.stored = node.seen[:size], node.stored[:size]

    def put(self, path: str, data: bytes) -> None:
        """Make `path` hold exactly `data`, durably, its directory included."""
        self.make_directory(_directory(path))
        node = self._names.setdefault(path, _Node())
        node.seen, node.stored, node.dirty = bytearray(data), bytearray(data), []
        self._stored_names[path] = node

    def durable(self, path: str) -> bytearray | None:
        """The bytes of the file as any power loss leaves them; None if it may lose some of them, or the name."""
        node, now = self._stored_names.get(path), self._names.get(path)
        if node is None or now is None or node.dirty or now.dirty:
            return None
        # Another file may have got the name since the last sync of the directory: then either survives.
        return node.stored if node is now or node.stored == now.stored else None

    def delete(self, path: str) -> None:
        """Make `path` go, durably."""
        self._names.pop(path, None)
        self._stored_names.pop(path, None)

    def copy(self) -> SimulatedFiles:
        """A disk in the same state that goes its own way, with a copy of the random source."""
        return copy.deepcopy(self)

    def _tear(self, node: _Node) -> None:
        """Write back some of what is dirty."""
        how = self._random.randrange(0, 5)
        if how == 0 or not node.dirty:
            return
        if how == 1:
            node.sync()
            return
        total = sum(len(data) for _, data in node.dirty)
        if how == 2:
            left = self._random.randrange(0, total + 1)
            for offset, data in node.dirty:
                _splice(node.stored, offset, data[:left])
                left -= min(left, len(data))
            return
        before = len(node.stored)
        for offset, data in node.dirty:
            start = 0
            while start < len(data):
                end = min(len(data), start + SECTOR_BYTES - (offset + start) % SECTOR_BYTES)
                if self._random.randrange(0, 2):
                    _splice(node.stored, offset + start, data[start:end])
                elif how == 4 and offset + start >= before:
                    _splice(node.stored, offset + start, self._stale(end - start))
                start = end

    def _stale(self, size: int) -> bytes:
        """What a block held before the file system gave it to this file: sectors of some other one."""
        nodes = [node for node in self._stored_names.values() if len(node.stored) >= size]
        if not nodes:
            return bytes(self._random.randrange(0, 256) for _ in range(size))
        data = nodes[self._random.randrange(0, len(nodes))].stored
        start = self._random.randrange(0, (len(data) - size) // SECTOR_BYTES + 1) * SECTOR_BYTES
        return bytes(data[start : start + size])

    # -- what the file and this class share ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def operation(self, what: str, path: str) -> Iterator[bool]:
        """Count an operation around its doing; it is done before a power loss hits, since nothing of it is durable yet.

        Gives whether it is to fail.
        """
        if self._off:
            raise DiskCrash(f"{what} {path} without power")
        self.operations += 1
        full = self.full and what in _TAKES_SPACE
        failing = full or self.operations == self.fail_at
        yield failing
        if full:
            raise OSError(errno.ENOSPC, "simulated disk: no space is left", path)
        if failing:
            raise OSError(errno.EIO, f"simulated failure of operation {self.operations}", path)
        self._maybe_lose_power(what, path)

    def sync_node(self, path: str, node: _Node) -> None:
        """Sync one file; power is lost before anything of it is certain."""
        self._before_sync("sync", path, node)
        node.sync()

    def _before_sync(self, what: str, path: str, node: _Node | None) -> None:
        if self._off:
            raise DiskCrash(f"{what} {path} without power")
        self.operations += 1
        self._maybe_lose_power(what, path)
        if self.operations == self.fail_at:
            if node is not None:
                node.dirty.clear()
            raise OSError(errno.EIO, f"simulated failure of operation {self.operations}", path)

    def _maybe_lose_power(self, what: str, path: str) -> None:
        if self.operations == self.lose_power_at:
            self._off = True
            raise DiskCrash(f"at operation {self.operations}: {what} {path}")

    def _count_read(self, path: str) -> None:
        self.reads += 1
        if self.reads == self.fail_read_at:
            raise OSError(errno.EIO, f"simulated failure of read {self.reads}", path)

    def _node(self, path: str) -> _Node:
        node = self._names.get(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return node

    # -- marble.env.Files ----------------------------------------------------------------------------------------------

    def make_directory(self, path: str) -> None:
        parts = path.split("/")
        self._directories.update("/".join(parts[: end + 1]) for end in range(len(parts)))

    def list(self, path: str) -> Sequence[str]:
        if path in self._names:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
        prefix = path + "/" if path else ""
        known = (*self._names, *(each for each in self._directories if each))
        return sorted({name.removeprefix(prefix).partition("/")[0] for name in known if name.startswith(prefix)})

    def exists(self, path: str) -> bool:
        return path in self._names or path in self._directories

    def size(self, path: str) -> int:
        return len(self._node(path).seen)

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        self._count_read(path)
        data = self._node(path).seen
        return bytes(data[offset : len(data) if size is None else offset + size])

    def map(self, path: str) -> pa.Buffer:
        self._count_read(path)
        # The bytes themselves, not a copy: what befalls the file befalls whoever has mapped it.
        return pa.py_buffer(self._node(path).seen)

    def create(self, path: str) -> SimulatedAppendFile:
        if path in self._names:
            raise FileExistsError(errno.EEXIST, "file exists", path)
        with self.operation("create", path) as failing:
            node = _Node()
            if not failing:
                self._change(_NameChange(_directory(path), path, node))
        return SimulatedAppendFile(self, path, node, 0)

    def open_append(self, path: str) -> SimulatedAppendFile:
        return SimulatedAppendFile(self, path, self._node(path), self.size(path))

    def reuse(self, path: str) -> SimulatedAppendFile:
        return SimulatedAppendFile(self, path, self._node(path), 0)

    def overwrite(self, path: str, data: bytes) -> None:
        has_blocks = path in self._names and len(self._names[path].seen) >= len(data)
        with self.operation("write over" if has_blocks else "overwrite", path) as failing:
            if failing:
                return
            if path not in self._names:
                self._change(_NameChange(_directory(path), path, _Node()))
            self._names[path].write(0, bytes(data))

    def truncate(self, path: str, size: int) -> None:
        node = self._node(path)
        self._before_sync("truncate", path, node)
        node.sync()
        del node.seen[size:], node.stored[size:]

    def rename(self, source: str, target: str) -> None:
        with self.operation("rename", target) as failing:
            if failing:
                return
            if source not in self._directories:
                self._change(_NameChange(_directory(target), target, self._node(source), source))
                return
            if self.exists(target) and self.list(target):
                raise OSError(errno.ENOTEMPTY, "directory not empty", target)
            self._change(_TreeChange(_directory(target), target, source))
            self._move_directories(source, target)

    def _move_directories(self, source: str, target: str) -> None:
        self._directories = {
            target + each.removeprefix(source) if f"{each}/".startswith(f"{source}/") else each
            for each in self._directories
        }

    def set_aside(self, source: str, target: str) -> bool:
        node = self._node(source)
        if sum(each is node for each in self._names.values()) > 1:
            return False
        self.rename(source, target)
        return True

    def link(self, source: str, target: str) -> None:
        if target in self._names:
            raise FileExistsError(errno.EEXIST, "file exists", target)
        with self.operation("link", target) as failing:
            if not failing:
                self._change(_NameChange(_directory(target), target, self._node(source)))

    def remove(self, path: str) -> None:
        self._node(path)
        with self.operation("remove", path) as failing:
            if not failing:
                self._change(_NameChange(_directory(path), path, None))

    def remove_tree(self, path: str) -> None:
        for name in [name for name in self._names if name.startswith(f"{path}/")]:
            self.remove(name)
        self._directories = {each for each in self._directories if each != path and not each.startswith(f"{path}/")}

    def sync_directory(self, path: str) -> None:
        self._before_sync("sync_directory", path, None)
        kept: list[_NameChange | _TreeChange] = []
        for change in self._changes:
            if change.directory != path:
                kept.append(change)
                continue
            change.apply(self._stored_names)
            if isinstance(change, _TreeChange):
                kept = [change.moved(each) if isinstance(each, _NameChange) else each for each in kept]
        self._changes = kept

    def below(self, path: str) -> Subtree:
        return Subtree(self, path)

    @contextlib.contextmanager
    def lock(self, path: str) -> Iterator[None]:
        if path in self._locked:
            raise UnavailableError(
                f"{path} is in use by another marble node: stop that one, or choose another directory"
            )
        self._locked.add(path)
        try:
            yield
        finally:
            self._locked.discard(path)

    def describe(self, path: str) -> str:
        return f"simulated:{path}"

    def _change(self, change: _NameChange | _TreeChange) -> None:
        change.apply(self._names)
        self._changes.append(change)


def _directory(path: str) -> str:
    return path.rpartition("/")[0]


def _splice(target: bytearray, offset: int, data: bytes) -> None:
    if not data:
        return
    if offset > len(target):
        target.extend(bytes(offset - len(target)))
    target[offset : offset + len(data)] = data
