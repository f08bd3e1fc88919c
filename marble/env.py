"""The seams to the world: time, chance and files. Production and simulator put different things behind them.

Whatever decides takes one of these as an argument and never reaches for ``time``, ``random`` or ``os`` itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import pyarrow as pa

from marble.errors import UnavailableError, UsageError


class Clock(Protocol):
    """Time, of two kinds: one to measure with, and one to write down."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back. Only differences mean anything."""
        ...

    def wall_us(self) -> int:
        """Microseconds since 1970 UTC, as far as this machine knows. May jump, both ways."""
        ...


class Random(Protocol):
    """A seeded source of chance."""

    def randrange(self, start: int, stop: int) -> int:
        """An integer in ``[start, stop)``."""
        ...


class AppendFile(Protocol):
    """A file that is written from its beginning to its end. One thread at a time.

    - What `write` has returned may be lost by a crash until `sync` has returned.
    - The file may go on behind `size`: *room*, over which the next writes go. Their sync waits for the data alone, where
      that of a file that grows waits for the file system's journal as well.
    - A `sync` that raised is never repeated: what it covered may be gone although the next one succeeds.
    """

    @property
    def size(self) -> int:
        """Bytes written so far, synced or not."""
        ...

    @property
    def room(self) -> int:
        """Bytes of the file behind `size`."""
        ...

    def write(self, data: bytes | memoryview, zeros: int = 0) -> None:
        """Append all of `data`, and behind it, as room, up to `zeros` zero bytes: fewer if the disk is full.

        Raises OSError; how much of it was written is then unknown.
        """
        ...

    def sync(self) -> None:
        """Return when everything written is on the disk. Raises OSError."""
        ...

    def close(self) -> None:
        """Give the file back without a sync. Idempotent."""
        ...


class Files(Protocol):
    """A directory tree. Paths are strings relative to the root that the implementation was made with."""

    def make_directory(self, path: str) -> None:
        """Create `path` and its parents unless they exist, and sync the parents."""
        ...

    def list(self, path: str) -> Sequence[str]:
        """Names in directory `path`, sorted."""
        ...

    def exists(self, path: str) -> bool: ...

    def size(self, path: str) -> int: ...

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Up to `size` bytes (all, if None) from `offset`; fewer only at the end of the file."""
        ...

    def map(self, path: str) -> pa.Buffer:
        """The bytes of a file that does not change any more, read when they are touched.

        They stay as long as the buffer does, also when the file is removed or another gets its name.
        """
        ...

    def create(self, path: str) -> AppendFile:
        """A new, empty file that must not exist yet. Durable in the directory only after `sync_directory`."""
        ...

    def open_append(self, path: str) -> AppendFile:
        """An existing file, to be continued at its end."""
        ...

    def reuse(self, path: str) -> AppendFile:
        """An existing file, to be written anew from its beginning: all that is in it is room."""
        ...

    def overwrite(self, path: str, data: bytes) -> None:
        """Write `data` over the first bytes of `path` (created if missing), without a sync."""
        ...

    def truncate(self, path: str, size: int) -> None:
        """Cut `path` to `size` bytes and sync it."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Put `source` in the place of `target`; a directory in that of an empty one, or of none. Durable only after `sync_directory`."""
        ...

    def set_aside(self, source: str, target: str) -> bool:
        """`rename`, unless the file has a further name: then somebody else relies upon what is in it. Returns whether."""
        ...

    def link(self, source: str, target: str) -> None:
        """Give the file `source` a further name, which must be free. Durable only after `sync_directory`."""
        ...

    def remove(self, path: str) -> None: ...

    def remove_tree(self, path: str) -> None:
        """Remove the directory `path` and all that is in it, if it exists. For what nobody relies upon."""
        ...

    def sync_directory(self, path: str) -> None:
        """Make creations, renames and removals in `path` durable."""
        ...

    def below(self, path: str) -> Files:
        """The directory `path`, which need not exist yet, as a tree of its own."""
        ...

    def lock(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Hold the tree for this process. Raises UnavailableError if another holder lives."""
        ...

    def describe(self, path: str) -> str:
        """`path` as the user would find it, for messages."""
        ...


_MONOTONIC: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Linux's monotonic clock stands still while the machine is suspended; a lease that rests upon it would outlive that."""


class SystemClock:
    """The operating system's clocks. The monotonic one counts the time that the machine is suspended, too."""

    def monotonic(self) -> float:
        return time.clock_gettime(_MONOTONIC)

    def wall_us(self) -> int:
        return time.time_ns() // 1000


class SystemRandom:
    """Chance for production: seeded from the operating system unless a seed is given."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def randrange(self, start: int, stop: int) -> int:
        return self._random.randrange(start, stop)


_ZEROS: Final = memoryview(bytes(256 * 1024))
_DISK_IS_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class SystemAppendFile:
    """An `AppendFile` on a real file system.

    Parameters
    ----------
    descriptor
        The file, open for writing.
    size
        Where the first write goes.
    end
        Where the file ends.
    """

    def __init__(self, descriptor: int, size: int, end: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._end = end

    @property
    def size(self) -> int:
        return self._size

    @property
    def room(self) -> int:
        return self._end - self._size

    def write(self, data: bytes | memoryview, zeros: int = 0) -> None:
        view, behind = memoryview(data).cast("B"), _ZEROS[:zeros]
        while view:
            try:
                written = os.pwritev(self._descriptor, [view, behind], self._size)
            except OSError as error:
                if not behind or error.errno not in _DISK_IS_FULL:
                    raise
                behind = behind[:0]
                continue
            self._end = max(self._end, self._size + written)
            written = min(written, len(view))
            self._size += written
            view = view[written:]

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SystemFiles:
    """`Files` below a directory of a real file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()

    def _path(self, path: str) -> Path:
        if path.startswith("/") or ".." in path.split("/"):
            raise UsageError(f"path {path!r} leaves the data directory")
        return self._root / path

    def make_directory(self, path: str) -> None:
        missing = []
        directory = self._path(path)
        while not directory.exists():
            missing.append(directory)
            directory = directory.parent
        for directory in reversed(missing):
            directory.mkdir(exist_ok=True)
            self._sync_directory(directory.parent)

    def list(self, path: str) -> Sequence[str]:
        return sorted(os.listdir(self._path(path)))

    def exists(self, path: str) -> bool:
        return self._path(path).exists()

    def size(self, path: str) -> int:
        return self._path(path).stat().st_size

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        with open(self._path(path), "rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)

    def map(self, path: str) -> pa.Buffer:
        if not self.size(path):
            return pa.py_buffer(b"")  # Nothing cannot be mapped.
        with pa.memory_map(str(self._path(path)), "r") as mapped:
            return mapped.read_buffer()

    def create(self, path: str) -> AppendFile:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return SystemAppendFile(os.open(self._path(path), flags, 0o644), 0, 0)

    def open_append(self, path: str) -> AppendFile:
        descriptor = os.open(self._path(path), os.O_WRONLY | os.O_CLOEXEC)
        size = os.fstat(descriptor).st_size
        return SystemAppendFile(descriptor, size, size)

    def reuse(self, path: str) -> AppendFile:
        descriptor = os.open(self._path(path), os.O_WRONLY | os.O_CLOEXEC)
        return SystemAppendFile(descriptor, 0, os.fstat(descriptor).st_size)

    def overwrite(self, path: str, data: bytes) -> None:
        descriptor = os.open(self._path(path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, data, 0)
        finally:
            os.close(descriptor)

    def truncate(self, path: str, size: int) -> None:
        descriptor = os.open(self._path(path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        os.rename(self._path(source), self._path(target))

    def set_aside(self, source: str, target: str) -> bool:
        if self._path(source).stat().st_nlink > 1:
            return False
        self.rename(source, target)
        return True

    def link(self, source: str, target: str) -> None:
        os.link(self._path(source), self._path(target))

    def remove(self, path: str) -> None:
        os.unlink(self._path(path))

    def remove_tree(self, path: str) -> None:
        if self._path(path).exists():
            shutil.rmtree(self._path(path))

    def sync_directory(self, path: str) -> None:
        self._sync_directory(self._path(path))

    def below(self, path: str) -> SystemFiles:
        return SystemFiles(self._path(path))

    def move_out(self, path: str, target: str | os.PathLike[str]) -> None:
        """Move the directory `path` to `target`, which must not exist, on the same file system. Durable when this returns.

        Raises
        ------
        UsageError
            It cannot be there.
        """
        place = Path(target).absolute()
        if place.exists():
            raise UsageError(f"{place} exists already: choose another place")
        try:
            os.rename(self._path(path), place)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENOTEMPTY):
                raise
            raise UsageError(
                f"{place} cannot be made ({error.strerror}): name a new directory in one that exists, on the same file "
                f"system as {self._root}"
            ) from None
        self._sync_directory(place.parent)

    @staticmethod
    def _sync_directory(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def lock(self, path: str) -> Iterator[None]:
        descriptor = os.open(self._path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise UnavailableError(
                    f"{self._root} is in use by another marble node: stop that one, or choose another directory"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def describe(self, path: str) -> str:
        return str(self._path(path))
