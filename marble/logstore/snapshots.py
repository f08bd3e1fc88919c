"""The snapshots of one group on this node: written, received from the leader, read, handed on in pieces, removed.

Files, all in one directory; ``G``, ``I``, ``T`` are group, index and term as 8, 16 and 16 hexadecimal digits:

- ``G-I-T.arrows``: a snapshot (`marble.logstore.snapshot_file`). It gets this name when all of it is durable, so a
  file of this name is whole, or damaged.
- ``G-I-T-C-N.part``: what has arrived so far of one with checksum ``C`` and ``N`` bytes. Nothing in it is trusted after
  a restart but rows that are sound, and these are written anew: see `SnapshotStore.receive`.
- ``*.tmp``: being written, or left by a crash; never read.

Rule 1: a name that ends in ``.arrows`` is given by a rename after a sync of everything in the file, and relied upon only
after the sync of the directory behind it.
Rule 2: after a failed write or sync of a file, that file is given up. It is never synced again, since that may succeed
without writing anything.
Rule 3: the newest snapshot is never removed, nor one that is pinned.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import pyarrow as pa

from marble._core.checksum import Xxh3
from marble.env import AppendFile, Files
from marble.errors import CorruptionError, ProtocolError, UnavailableError, check
from marble.logstore.contents import ContentFiles
from marble.logstore.receiving import PartialFile
from marble.logstore.snapshot_file import WINDOW_BYTES, Encoder, FileReader, SnapshotInfo
from marble.machine import FileRef
from marble.types import SnapshotMeta
from marble.writing import SYNC_BYTES, write_paced

__all__ = ["DIRECTORY", "SYNC_BYTES", "Receiver", "SnapshotInfo", "SnapshotStore"]

DIRECTORY: Final = "snapshots"

_NAME: Final = re.compile(r"([0-9a-f]{8})-([0-9a-f]{16})-([0-9a-f]{16})\.arrows")
_PART: Final = ".part"
_TEMPORARY: Final = ".tmp"


class SnapshotStore:
    """The snapshots of one group.

    Thread safety: `write` on one thread, everything that concerns receiving on one thread, `read` of what is pinned or
    newest and all else on any. The files of other groups in the directory are left alone.

    Parameters
    ----------
    files
        The node's files.
    group
        The group.

    Raises
    ------
    CorruptionError
        A snapshot is damaged; path and offset are in the error. All snapshots are read once to find that out.
    """

    def __init__(self, files: Files, group: int) -> None:
        self.contents = ContentFiles(files, group)
        """The files that snapshots refer to."""
        self._files = files
        self._group = group
        self._lock = threading.Lock()
        self._infos: dict[int, SnapshotInfo] = {}
        self._pins: Counter[int] = Counter()
        self._unsynced = False
        """Whether a removal may not be durable yet: what it refers to must stay so long."""
        self._files_of: dict[SnapshotInfo, tuple[FileRef, ...]] = {}
        self._receiver: Receiver | None = None
        files.make_directory(DIRECTORY)
        # A process may have been killed between a rename and its sync: from here on the names are relied upon.
        files.sync_directory("")
        self._clear(_TEMPORARY)
        files.sync_directory(DIRECTORY)
        for name in files.list(DIRECTORY):
            match = _NAME.fullmatch(name)
            if match is not None and int(match[1], 16) == group:
                self._take_in(self._verified(name, int(match[2], 16), int(match[3], 16)))

    @property
    def group(self) -> int:
        """Whose snapshots they are."""
        return self._group

    def infos(self) -> list[SnapshotInfo]:
        """All snapshots, by ascending index."""
        with self._lock:
            return [self._infos[index] for index in sorted(self._infos)]

    def newest(self) -> SnapshotInfo | None:
        """The snapshot with the highest index, if there is any."""
        with self._lock:
            return self._infos[max(self._infos)] if self._infos else None

    def write(
        self,
        meta: SnapshotMeta,
        endpoints: Mapping[int, str],
        batches: Iterable[pa.RecordBatch],
        pace: Callable[[int], None] | None = None,
        *,
        renew: bool = False,
    ) -> SnapshotInfo:
        """Make a snapshot. When this returns it is durable.

        Parameters
        ----------
        meta
            What it stands for.
        endpoints
            Where the members are to be reached.
        batches
            What `marble.machine.MachineState.batches` of that state gives.
        pace
            Called after each sync of a part with the bytes that it had; may wait, and may raise to give up.
        renew
            Take the place of one of the same entry, which holds the same in other files, unless somebody reads it.

        Returns
        -------
        SnapshotInfo
            What is there of that entry now.

        Raises
        ------
        OSError
            The disk failed or is full. There is no snapshot then, or the one that was there, and all else is as before.
        """
        existing = self._infos.get(meta.index)
        if existing is not None and existing.term == meta.term and (not renew or self._pins[meta.index]):
            return existing
        encoder = Encoder()

        def messages() -> Iterator[pa.Buffer]:
            yield from encoder.head(self._group, meta, endpoints)
            yield from (encoder.rows(batch) for batch in batches if batch.num_rows)
            yield from encoder.tail()

        path = _path(self._group, meta.index, meta.term)
        with self._giving_up(path + _TEMPORARY):
            with contextlib.closing(self._create(path + _TEMPORARY)) as file:
                write_paced(file, messages(), pace)
            info = SnapshotInfo(
                self._group, meta.index, meta.term, meta.members, dict(endpoints), encoder.nbytes, encoder.checksum
            )
            if existing is not None and existing.term == meta.term:
                return self._exchange(existing, info, path)
            self._publish(path + _TEMPORARY, path)
        self._take_in(info)
        return info

    def _exchange(self, old: SnapshotInfo, new: SnapshotInfo, path: str) -> SnapshotInfo:
        """Put what was written for `new` in the place of `old`. Returns the one that is there then."""
        with self._lock:
            # At once for whoever pins it: of a name and what is known of it nobody may have one without the other.
            if self._pins[old.index]:
                self._files.remove(path + _TEMPORARY)
                return old
            self._files.rename(path + _TEMPORARY, path)
            self._infos[new.index] = new
            self._files_of.pop(old, None)
        # Before this returns nobody removes a file that only the old one refers to.
        self._files.sync_directory(DIRECTORY)
        return new

    def read(self, info: SnapshotInfo) -> Iterator[pa.RecordBatch]:
        """The rows that `write` was given, each verified, in batches of schema `SNAPSHOT_SCHEMA`.

        Raises
        ------
        CorruptionError
            While iterating: something is damaged, or the end is missing. What came before is then of no use.
        """
        return FileReader(self._files, self._existing(info)).rows()

    def files(self, info: SnapshotInfo) -> tuple[FileRef, ...]:
        """The files that the state consists of besides its rows, each once. Raises as `read`, and UnavailableError."""
        known = self._files_of.get(info)
        if known is None:
            known = self._files_of[info] = FileReader(self._files, self._existing(info)).refs()
        return known

    def known_files(self, info: SnapshotInfo) -> tuple[FileRef, ...]:
        """As `files`, without reading: none if nobody has asked for them before. Any thread."""
        return self._files_of.get(info, ())

    def kept(self) -> set[str]:
        """Names of the files that the snapshots here consist of."""
        return {ref.name for info in self.infos() for ref in self.files(info)}

    def piece(self, info: SnapshotInfo, offset: int, bytes_max: int) -> bytes:
        """Bytes of the file from `offset` on: `bytes_max` of them, or fewer where it ends.

        Raises
        ------
        UnavailableError
            There is no such snapshot here any more: offer a newer one.
        ProtocolError
            `offset` is outside of the file, or `bytes_max` is not positive.
        """
        if not 0 <= offset < info.nbytes or bytes_max <= 0:
            raise ProtocolError(f"asked for {bytes_max} bytes at {offset} of a snapshot of {info.nbytes} bytes")
        wanted = min(bytes_max, info.nbytes - offset)
        path = self._existing(info)
        try:
            data = self._files.read(path, offset, wanted)
        except FileNotFoundError:
            self._existing(info)  # Another thread may have pruned it since: then that is what the caller hears.
            raise
        if len(data) < wanted:
            raise CorruptionError("a snapshot became shorter", self._files.describe(path), offset + len(data))
        return data

    def receive(self, info: SnapshotInfo) -> Receiver:
        """Begin to receive the file of `info`, or go on with it.

        What an earlier process has left of exactly this file is kept as far as its rows are sound; that part is copied,
        because what can be read after a restart need not be on the disk. That takes as long as reading and writing it.
        Something else that was being received is given up.

        Raises
        ------
        OSError
            The disk failed or is full.
        """
        check(info.group == self._group, f"a snapshot of group {info.group} for the store of group {self._group}")
        if self._receiver is not None:
            if self._receiver.info == info:
                return self._receiver
            self.discard_partial()
        path = f"{_path(info.group, info.index, info.term, '')}-{info.checksum:016x}-{info.nbytes:016x}{_PART}"
        self._clear(_PART, keep=path)
        sound = self._sound_bytes(path, info.nbytes) if self._files.exists(path) else 0
        file = self._create(path + _TEMPORARY)
        try:
            total = self._copy(path, file, sound)
            self._files.rename(path + _TEMPORARY, path)
        except BaseException:
            file.close()
            raise
        self._receiver = Receiver(self, info, path, file, total)
        return self._receiver

    def received(self, info: SnapshotInfo) -> Iterator[pa.RecordBatch]:
        """The rows of what is being received, when all of it is there and checked; any thread. Raises as `read`."""
        receiver = self._receiver
        if receiver is None or receiver.info != info:
            raise UnavailableError(f"a snapshot at {info.index} is not being received any more")
        return FileReader(self._files, receiver.path).rows()

    @property
    def has_partial(self) -> bool:
        """Whether something of a snapshot has arrived, and not all of it."""
        return any(self._is_own(name, _PART) for name in self._files.list(DIRECTORY))

    def discard_partial(self) -> None:
        """Give up what is being received, and what an earlier process has left of such."""
        if self._receiver is not None:
            self._receiver.close()
        self._clear(_PART)

    def prune(self, keep_from_index: int) -> int:
        """Remove snapshots below `keep_from_index`, but no pinned one and not the newest. When this returns that is durable.

        Returns
        -------
        int
            Bytes given back.
        """
        gone = 0
        while (info := self._take_out(keep_from_index)) is not None:
            self._unsynced = True
            try:
                self._files.remove(_path(info.group, info.index, info.term))
            except OSError:
                self._take_in(info)
                raise
            self._files_of.pop(info, None)
            gone += info.nbytes
        if self._unsynced:
            self._files.sync_directory(DIRECTORY)
            self._unsynced = False
        return gone

    def pin(self, index: int) -> None:
        """Keep the snapshot at `index` until it is unpinned as often as it was pinned.

        Raises UnavailableError if there is none: another thread may prune it between a look and this call.
        """
        with self._lock:
            if index not in self._infos:
                raise UnavailableError(f"there is no snapshot at {index} here any more")
            self._pins[index] += 1

    @contextlib.contextmanager
    def pinned(self) -> Iterator[list[SnapshotInfo]]:
        """All snapshots, by ascending index, which stay, with all files that they refer to, while this is entered."""
        with self._lock:
            infos = [self._infos[index] for index in sorted(self._infos)]
            self._pins.update(info.index for info in infos)
        try:
            yield infos
        finally:
            for info in infos:
                self.unpin(info.index)

    def unpin(self, index: int) -> None:
        """Undo one `pin`."""
        with self._lock:
            check(self._pins[index] > 0, f"the snapshot at {index} is not pinned")
            self._pins[index] -= 1

    # -- what a receiver needs ---------------------------------------------------------------------------------------

    def _check_received(self, receiver: Receiver) -> tuple[FileRef, ...]:
        """Verify a file of which all bytes are there, and say to which files it refers."""
        info, reader = receiver.info, FileReader(self._files, receiver.path)
        found = reader.verify(self._group)
        if found != info:
            raise CorruptionError(f"received {found} instead of {info}", self._files.describe(receiver.path), 0)
        return reader.refs()

    def _received(self, receiver: Receiver) -> SnapshotInfo:
        """Give a file that was verified its name. One of this node's own that was made meanwhile is as good, and stays."""
        info, refs = receiver.info, receiver.check()
        own = self._infos.get(info.index)
        if own is not None and own.term == info.term:
            # The same state, in other files: each node compacts for itself.
            self._files.remove(receiver.path)
            return own
        self._publish(receiver.path, _path(info.group, info.index, info.term))
        self._files_of[info] = refs
        self._take_in(info)
        return info

    def _forget(self, receiver: Receiver) -> None:
        if self._receiver is receiver:
            self._receiver = None

    # -- files -------------------------------------------------------------------------------------------------------

    def _take_in(self, info: SnapshotInfo) -> None:
        with self._lock:
            known = self._infos.setdefault(info.index, info)
        check(known == info, f"two snapshots of group {self._group} at {info.index} differ: {known} and {info}")

    def _take_out(self, keep_from_index: int) -> SnapshotInfo | None:
        """Forget the oldest snapshot that may go, and return it; None if there is none."""
        with self._lock:
            old = sorted(index for index in self._infos if index < keep_from_index and not self._pins[index])
            if not old or old[0] == max(self._infos):
                return None
            return self._infos.pop(old[0])

    def _verified(self, name: str, index: int, term: int) -> SnapshotInfo:
        reader = FileReader(self._files, f"{DIRECTORY}/{name}")
        info = reader.verify(self._group)
        if (info.index, info.term) != (index, term):
            raise reader.damage(0, f"it is of entry {info.index} of term {info.term}, which its name denies")
        return info

    def _existing(self, info: SnapshotInfo) -> str:
        if self._infos.get(info.index) != info:
            raise UnavailableError(f"there is no snapshot at {info.index} of term {info.term} here any more")
        return _path(info.group, info.index, info.term)

    def _create(self, path: str) -> AppendFile:
        if self._files.exists(path):
            self._files.remove(path)
        return self._files.create(path)

    def _publish(self, temporary: str, path: str) -> None:
        self._files.rename(temporary, path)
        self._files.sync_directory(DIRECTORY)

    @contextlib.contextmanager
    def _giving_up(self, path: str) -> Iterator[None]:
        """Remove `path` if what is done here fails: a disk that is full needs the room."""
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):
                self._files.remove(path)
            raise

    def _clear(self, suffix: str, keep: str = "") -> None:
        """Remove files of this group that end in `suffix`, all but `keep`."""
        for name in self._files.list(DIRECTORY):
            path = f"{DIRECTORY}/{name}"
            if self._is_own(name, suffix) and path != keep:
                self._files.remove(path)

    def _is_own(self, name: str, suffix: str) -> bool:
        return name.startswith(f"{self._group:08x}-") and name.endswith(suffix)

    def _sound_bytes(self, path: str, nbytes: int) -> int:
        """How much of the file at `path` is a run of sound messages."""
        end = 0
        with contextlib.suppress(CorruptionError):
            for piece in FileReader(self._files, path).pieces():
                end = piece.end
        return end if end <= nbytes else 0

    def _copy(self, path: str, file: AppendFile, size: int) -> Xxh3:
        """Write the first `size` bytes of `path` to `file`, synced. Returns their hash."""
        total = Xxh3()

        def windows() -> Iterator[bytes]:
            for offset in range(0, size, WINDOW_BYTES):
                data = self._files.read(path, offset, min(WINDOW_BYTES, size - offset))
                if len(data) < min(WINDOW_BYTES, size - offset):
                    raise OSError(f"{self._files.describe(path)} became shorter while it was read")
                total.update(data)
                yield data

        write_paced(file, windows(), None)
        return total


class Receiver(PartialFile):
    """A snapshot on its way in. One thread.

    - The bytes below ``offset`` are written and synced.
    - After an OSError or `close` it is of no use; `SnapshotStore.receive` gives another.
    """

    def __init__(self, store: SnapshotStore, info: SnapshotInfo, path: str, file: AppendFile, total: Xxh3) -> None:
        super().__init__(path, file, total, info.nbytes, "a snapshot")
        self.info = info
        self._store = store
        self._total = total
        self._refs: tuple[FileRef, ...] | None = None

    def check(self) -> tuple[FileRef, ...]:
        """Verify the whole file, and return the files that it refers to: the snapshot is whole only with them.

        Raises
        ------
        ProtocolError
            Bytes are missing yet.
        CorruptionError
            It is not the file that was announced, or a damaged one. It was removed: begin anew.
        OSError
            The disk failed.
        """
        self._check_complete()
        if self._refs is None:
            check(self._open, "a receiver was used after it was closed")
            try:
                if self._total.digest() != self.info.checksum:
                    raise CorruptionError(
                        f"the snapshot of entry {self.info.index} was damaged on its way: it is fetched anew"
                    )
                self._refs = self._store._check_received(self)
            except CorruptionError:
                self._store.discard_partial()
                raise
        return self._refs

    def finish(self) -> SnapshotInfo:
        """Make it a snapshot of this node, after `check`. When this returns it is durable.

        The files that it refers to must be there by then. Returns what is here of that index: perhaps one that was made here
        while this one was on its way. Raises as `check` does.
        """
        check(self._open, "a receiver was used after it was closed")
        self.check()
        self.close()
        return self._store._received(self)

    def close(self) -> None:
        """Stop receiving; what is there stays, to be gone on with. Idempotent."""
        super().close()
        self._store._forget(self)


def snapshot_paths(files: Files) -> list[tuple[str, int]]:
    """Path and group of every file that is named as a snapshot."""
    if not files.exists(DIRECTORY):
        return []
    matches = (_NAME.fullmatch(name) for name in files.list(DIRECTORY))
    return [(f"{DIRECTORY}/{match[0]}", int(match[1], 16)) for match in matches if match is not None]


def snapshot_path(info: SnapshotInfo) -> str:
    """Where the snapshot is, in the directory that has it."""
    return _path(info.group, info.index, info.term)


def _path(group: int, index: int, term: int, suffix: str = ".arrows") -> str:
    return f"{DIRECTORY}/{group:08x}-{index:016x}-{term:016x}{suffix}"
