"""Files that snapshots refer to: named by their content, handed on in pieces, received and verified.

Files, all in one directory; ``G`` is the group as 8 hexadecimal digits:

- ``G-NAME.arrow``: a file; ``NAME`` is the XXH3-128 of its bytes as 32 hexadecimal digits. Who makes such files, and what
  is in them, is not known here.
- ``G-NAME.part``: what has arrived of one so far.
- ``G-NAME.part.tmp``: left by a crash; never read.

Rule 1: a received file gets its name only when its bytes have been hashed and the hash is the name, by a rename after a
sync of everything in the file; nothing may refer to it before the sync of the directory behind that.
Rule 2: after a failed write or sync of a file, that file is given up. It is never synced again, since that may succeed
without writing anything. For the same reason what an earlier process has left is copied, and not continued.
Rule 3: a file that is said to be damaged is neither handed on nor counted as present, until another takes its name.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from marble._core.checksum import Xxh3Name
from marble.env import AppendFile, Files
from marble.errors import CorruptionError, ProtocolError, UnavailableError, check
from marble.logstore.receiving import PartialFile
from marble.machine import FileRef, file_key
from marble.writing import SYNC_BYTES, write_paced

DIRECTORY: Final = "tables"

_NAME: Final = re.compile(r"[0-9a-f]{32}")
_PART: Final = ".part"
_TEMPORARY: Final = ".tmp"


class ContentFiles:
    """The files of one group that are named by their content.

    Thread safety: `receive`, what it returns, `missing` and `discard` on one thread; all else on any.

    Parameters
    ----------
    files
        The node's files. Nothing is touched before the first call.
    group
        The group. Those of others in the directory are left alone.
    """

    def __init__(self, files: Files, group: int) -> None:
        self._files = files
        self._group = group
        self._lock = threading.Lock()
        self._damaged: frozenset[str] = frozenset()
        self._suspects: frozenset[str] = frozenset()
        self._keys: dict[int, str] = {}
        self._receiver: ContentReceiver | None = None
        self._ready = False

    def path(self, name: str) -> str:
        """Where the file with this name is, or would be."""
        check(_NAME.fullmatch(name), f"{name!a} is no name of a file")
        return f"{DIRECTORY}/{self._group:08x}-{name}.arrow"

    def names(self) -> list[str]:
        """The files that are there, sound or not."""
        if not self._files.exists(DIRECTORY):
            return []
        pattern = re.compile(rf"{self._group:08x}-([0-9a-f]{{32}})\.arrow")
        return [match[1] for name in self._files.list(DIRECTORY) if (match := pattern.fullmatch(name))]

    def name_of(self, path: str) -> str | None:
        """The name of the file at `path`, which may be as `Files.describe` gives it; None if that is none of ours."""
        match = re.fullmatch(rf"(.*[/:])?{DIRECTORY}/{self._group:08x}-([0-9a-f]{{32}})\.arrow", path)
        return None if match is None else match[2]

    def has(self, ref: FileRef) -> bool:
        """Whether the file is there. Its bytes are not read."""
        path = self.path(ref.name)
        return ref.name not in self._damaged and self._files.exists(path) and self._files.size(path) == ref.nbytes

    def missing(self, refs: Iterable[FileRef]) -> list[FileRef]:
        """Those of `refs` that are not there, each once, in their order."""
        self._prepare()
        return [ref for ref in dict.fromkeys(refs) if not self.has(ref)]

    @property
    def damaged(self) -> frozenset[str]:
        """Names of files of which it was said that they are damaged."""
        return self._damaged

    def blame(self, names: Collection[str]) -> None:
        """The files with these names are damaged or missing, all others are not known to be but those of `suspect`."""
        self._damaged = frozenset(names) | self._suspects

    def suspect(self, error: CorruptionError) -> None:
        """If `error` names one of these files, it is damaged, whoever else knows of it, until it has been received anew."""
        name = self.name_of(error.path or "")
        if name is not None:
            self._suspects |= {name}
            self._damaged |= {name}

    def piece(self, key: int, offset: int, bytes_max: int) -> bytes:
        """Bytes from `offset` on of the file that has this `FileRef.key`: `bytes_max` of them, or fewer where it ends.

        Raises
        ------
        UnavailableError
            There is no such file here, or none that is known to be sound.
        ProtocolError
            `offset` is outside of the file, or `bytes_max` is not positive.
        """
        name = self._named(key)
        if name is None or name in self._damaged:
            raise UnavailableError(f"there is no sound file with key {key:016x} here")
        path = self.path(name)
        try:
            size = self._files.size(path)
            if not 0 <= offset < size or bytes_max <= 0:
                raise ProtocolError(f"asked for {bytes_max} bytes at {offset} of a file of {size} bytes")
            data = self._files.read(path, offset, bytes_max)
        except OSError as error:
            # It may have gone meanwhile. If the disk is bad, whoever needs the file here will hear of it.
            raise UnavailableError(f"{self._files.describe(path)} could not be read: {error}") from error
        if not data:
            raise UnavailableError(f"{self._files.describe(path)} became shorter while it was read")
        return data

    def verify(self, ref: FileRef) -> None:
        """Read the file and compare it with its name. Raises CorruptionError if it is another one, or missing."""
        path = self.path(ref.name)
        where = self._files.describe(path)
        if not self._files.exists(path):
            raise CorruptionError("a file that a snapshot refers to is missing", where)
        size = self._files.size(path)
        if size != ref.nbytes:
            raise CorruptionError(f"a file has {size} bytes, not {ref.nbytes} as its snapshot says", where, size)
        total = Xxh3Name()
        for data in _windows(self._files, path, size):
            total.update(data)
        if total.name() != ref.name:
            raise CorruptionError("a file's bytes are not those that its name stands for", where, 0)

    def receive(self, ref: FileRef) -> ContentReceiver:
        """Begin to receive a file, or go on with it.

        What an earlier process has left of it is kept; that part is copied, which takes as long as reading and writing it.

        Raises
        ------
        OSError
            The disk failed or is full.
        """
        self._prepare()
        if self._receiver is not None:
            if self._receiver.ref == ref:
                return self._receiver
            self._receiver.close()
        path = self._part(ref.name)
        there = self._files.size(path) if self._files.exists(path) else 0
        file = self._create(path + _TEMPORARY)
        total = Xxh3Name()
        try:
            write_paced(file, _hashed(_windows(self._files, path, there if there <= ref.nbytes else 0), total), None)
            self._files.rename(path + _TEMPORARY, path)
        except BaseException:
            file.close()
            raise
        self._receiver = ContentReceiver(self, ref, path, file, total)
        return self._receiver

    def discard(self, kept: Iterable[FileRef] = ()) -> None:
        """Remove what has arrived of files, but of those in `kept`. Raises OSError."""
        kept_paths = {self._part(ref.name) for ref in kept}
        if self._receiver is not None and self._receiver.path not in kept_paths:
            self._receiver.close()
        if self._files.exists(DIRECTORY):
            for path in self._parts():
                if path not in kept_paths:
                    self._files.remove(path)

    # -- what a receiver needs ---------------------------------------------------------------------------------------

    def _received(self, receiver: ContentReceiver) -> None:
        self._files.rename(receiver.path, self.path(receiver.ref.name))
        self._files.sync_directory(DIRECTORY)
        self._suspects -= {receiver.ref.name}
        self._damaged -= {receiver.ref.name}

    def _forget(self, receiver: ContentReceiver) -> None:
        if self._receiver is receiver:
            self._receiver = None

    # -- files -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._ready:
            return
        self._files.make_directory(DIRECTORY)
        # A process may have been killed between a rename and its sync: from here on the names are relied upon.
        self._files.sync_directory("")
        for path in self._parts():
            if path.endswith(_TEMPORARY):
                self._files.remove(path)
        self._files.sync_directory(DIRECTORY)
        self._ready = True

    def _part(self, name: str) -> str:
        return self.path(name).removesuffix(".arrow") + _PART

    def _parts(self) -> list[str]:
        pattern = re.compile(rf"{self._group:08x}-[0-9a-f]{{32}}\.part(\.tmp)?")
        return [f"{DIRECTORY}/{name}" for name in self._files.list(DIRECTORY) if pattern.fullmatch(name)]

    def _named(self, key: int) -> str | None:
        """The name of the file with this key. The directory is read again when a key is asked for that was not there."""
        with self._lock:
            if key not in self._keys:
                self._keys = {file_key(name): name for name in self.names()}
            return self._keys.get(key)

    def _create(self, path: str) -> AppendFile:
        if self._files.exists(path):
            self._files.remove(path)
        return self._files.create(path)


class ContentReceiver(PartialFile):
    """A file on its way in. One thread.

    - The bytes below ``offset`` are written and synced.
    - After an OSError or `close` it is of no use; `ContentFiles.receive` gives another.
    """

    def __init__(self, contents: ContentFiles, ref: FileRef, path: str, file: AppendFile, total: Xxh3Name) -> None:
        super().__init__(path, file, total, ref.nbytes, "a file")
        self.ref = ref
        self._contents = contents
        self._total = total

    def finish(self) -> None:
        """Verify the whole and give it its name. When this returns it is durable.

        Raises
        ------
        ProtocolError
            Bytes are missing yet.
        CorruptionError
            It is not the file that was wanted. It was removed: begin anew, perhaps with another peer.
        OSError
            The disk failed.
        """
        check(self._open, "a receiver was used after it was closed")
        self._check_complete()
        self.close()
        if self._total.name() != self.ref.name:
            self._contents._files.remove(self.path)
            raise CorruptionError(f"the file {self.ref.name} did not arrive as it should be: it is fetched anew")
        self._contents._received(self)

    def close(self) -> None:
        """Stop receiving; what is there stays, to be gone on with. Idempotent."""
        super().close()
        self._contents._forget(self)


def _windows(files: Files, path: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, some at a time."""
    offset = 0
    while offset < size:
        data = files.read(path, offset, min(SYNC_BYTES, size - offset))
        if not data:
            raise OSError(f"{files.describe(path)} became shorter while it was read")
        yield data
        offset += len(data)


def _hashed(parts: Iterable[bytes], total: Xxh3Name) -> Iterator[bytes]:
    for data in parts:
        total.update(data)
        yield data
