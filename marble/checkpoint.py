"""A copy of a running node's data at one moment, made of links: what a backup starts from.

A checkpoint is a directory laid out as a data directory: identity, log, snapshots, the files that these refer to. Beside them
`MANIFEST` lists all files with their lengths; identity and manifest are written last, so a directory with an identity is whole. What never
changes is linked and costs no time; of the log's last segment, which grows, as much is copied as is durable.

Rule 1: while the links of the log are made, nothing is synced or purged, and all snapshots that are there then are pinned.
So one of them reaches to where the log begins, as at any moment of the node's life.
Rule 2: what a checkpoint holds answers for the node that it was made of. To start another node or cluster from it, it has
to be restored (`marble.backup`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from marble.env import Files, SystemFiles
from marble.errors import CorruptionError, UsageError
from marble.identity import IDENTITY_FILE, seal, unseal
from marble.logstore import contents, segment, snapshots
from marble.logstore.log import Log
from marble.logstore.snapshots import SnapshotStore, snapshot_path
from marble.writing import SYNC_BYTES

MANIFEST: Final = "backup.json"
CHECKPOINTS: Final = "checkpoints"
"""Where a node makes them, before they are moved or fetched. What is left there of an earlier run goes."""
FORMAT: Final = 1
KEPT_MAX: Final = 2
"""Checkpoints that are being fetched at a time. One that is kept keeps its files on the disk."""
DIRECTORIES: Final = (segment.DIRECTORY, snapshots.DIRECTORY, contents.DIRECTORY)
"""Where the files of a node are, besides its identity."""


def write_checkpoint(files: Files, log: Log, stores: Sequence[SnapshotStore], directory: str) -> dict[str, int]:
    """Make a checkpoint of a running node. Any thread.

    Parameters
    ----------
    files
        The node's.
    log, stores
        Its log, and the snapshots of all its groups.
    directory
        Where, below the root of `files`; must not exist.

    Returns
    -------
    dict
        Length of each file by its path below `directory`.

    Raises
    ------
    OSError
        The disk failed, is full, or knows no links. The directory is of no use then.
    CorruptionError
        A file that a snapshot refers to is missing.
    """
    for name in DIRECTORIES:
        files.make_directory(f"{directory}/{name}")
    growing = f"{directory}/{segment.DIRECTORY}/tail.tmp"
    with contextlib.ExitStack() as stack:
        with log.still() as still:
            for path in still.sealed:
                files.link(path, f"{directory}/{path}")
            files.link(still.tail, growing)
            pinned = [(store, stack.enter_context(store.pinned())) for store in stores]
        for store, infos in pinned:
            for info in infos:
                files.link(snapshot_path(info), f"{directory}/{snapshot_path(info)}")
            for ref in {ref: None for info in infos for ref in store.files(info)}:
                path = store.contents.path(ref.name)
                try:
                    files.link(path, f"{directory}/{path}")
                except FileNotFoundError:
                    raise CorruptionError("a file that a snapshot refers to is missing", files.describe(path)) from None
    copy(files, growing, files, f"{directory}/{still.tail}", still.tail_bytes)
    files.remove(growing)
    put(files, f"{directory}/{segment.SYNCED_PATH}", still.mark)
    return finish(files, files.read(IDENTITY_FILE), directory)


class Checkpoints:
    """Makes checkpoints of one node, each for as long as somebody needs it. Thread-safe.

    Parameters
    ----------
    files, log, stores
        The node's, see `write_checkpoint`. What an earlier run has left of checkpoints goes.
    """

    def __init__(self, files: Files, log: Log, stores: Sequence[SnapshotStore]) -> None:
        self._files = files
        self._log = log
        self._stores = stores
        self._lock = threading.Lock()
        self._made = 0
        self._kept: dict[str, dict[str, int]] = {}
        files.remove_tree(CHECKPOINTS)

    def make(self) -> tuple[str, dict[str, int]]:
        """A checkpoint that is kept until it is dropped, or until `KEPT_MAX` later ones are made.

        Returns its name, and its files with their lengths. Raises as `write_checkpoint`.
        """
        with self._lock:
            while len(self._kept) >= KEPT_MAX:
                self._drop(next(iter(self._kept)))
            self._made += 1
            name = f"{self._made:08x}"
            try:
                self._kept[name] = write_checkpoint(self._files, self._log, self._stores, f"{CHECKPOINTS}/{name}")
            except BaseException:
                self._files.remove_tree(f"{CHECKPOINTS}/{name}")
                raise
            return name, self._kept[name]

    def read(self, name: str, path: str, offset: int, bytes_max: int) -> bytes:
        """Bytes of the file `path` of the checkpoint `name`. Raises UsageError if there is no such, or not so many."""
        nbytes = self._kept.get(name, {}).get(path)
        if nbytes is None:
            raise UsageError(
                f"there is no checkpoint {name[:80]!a} with a file {path[:80]!a} here any more: begin anew"
            )
        if not 0 <= offset <= nbytes:
            raise UsageError(f"asked for byte {offset} of {path}, which has {nbytes}")
        return self._files.read(f"{CHECKPOINTS}/{name}/{path}", offset, min(bytes_max, nbytes - offset))

    def drop(self, name: str) -> None:
        """The checkpoint is needed no longer. Idempotent."""
        with self._lock:
            if name in self._kept:
                self._drop(name)

    def place(self, target: str | os.PathLike[str]) -> int:
        """Make a checkpoint in a new directory on the file system of the data directory; returns the bytes in it.

        Raises UsageError if it cannot be there, and as `write_checkpoint`.
        """
        if os.path.exists(target) or not isinstance(self._files, SystemFiles):
            raise UsageError(f"{os.fspath(target)} exists already: choose another place")
        name, listed = self.make()
        with self._lock:
            del self._kept[name]
            try:
                self._files.move_out(f"{CHECKPOINTS}/{name}", target)
            except BaseException:
                self._files.remove_tree(f"{CHECKPOINTS}/{name}")
                raise
        return sum(listed.values())

    def _drop(self, name: str) -> None:
        del self._kept[name]
        self._files.remove_tree(f"{CHECKPOINTS}/{name}")


def finish(files: Files, identity: bytes, directory: str = "") -> dict[str, int]:
    """Make a directory whole of which all files are there and synced but `identity` and the manifest.

    Until all of them are durable there is no identity, and without one nobody takes the directory for anything. Returns the files
    and their lengths.
    """
    prefix = f"{directory}/" if directory else ""
    for name in DIRECTORIES:
        files.sync_directory(prefix + name)
    put(files, prefix + IDENTITY_FILE, identity)
    listed = {path: files.size(prefix + path) for path in sorted([IDENTITY_FILE, *_below(files, prefix)])}
    put(files, prefix + MANIFEST, seal({"format": FORMAT, "files": listed}))
    files.sync_directory(directory)
    return listed


def read_manifest(files: Files) -> dict[str, int]:
    """What the manifest in the root of `files` lists. Raises CorruptionError if it is damaged."""
    where = files.describe(MANIFEST)
    found = unseal(files.read(MANIFEST), "manifest of the backup", where)
    listed = found.get("files")
    if found.get("format") != FORMAT or not isinstance(listed, dict):
        raise CorruptionError(f"the backup has format {found.get('format')!r}, not {FORMAT}: use its marble", where, 0)
    return checked_listing(listed, where)


def checked_listing(listed: Mapping[str, object], where: str) -> dict[str, int]:
    """`listed`, if it can be that of a manifest: it may come from another machine, and its paths are written to."""
    result: dict[str, int] = {}
    for path, nbytes in listed.items():
        folder, _, name = path.rpartition("/")
        inside = path == IDENTITY_FILE or (folder in DIRECTORIES and name not in ("", ".", ".."))
        if not inside or "\0" in path or type(nbytes) is not int or nbytes < 0:
            raise CorruptionError(f"a backup cannot have a file {path!a} of {nbytes!a} bytes", where)
        result[path] = nbytes
    return result


def _below(files: Files, prefix: str) -> Iterable[str]:
    for folder in DIRECTORIES:
        if files.exists(prefix + folder):
            yield from (f"{folder}/{name}" for name in files.list(prefix + folder))


def put(files: Files, path: str, data: bytes) -> None:
    """A new small file, synced."""
    with contextlib.closing(files.create(path)) as file:
        file.write(data)
        file.sync()


def copy(source: Files, path: str, target: Files, new_path: str, nbytes: int) -> None:
    """Copy the first `nbytes` of a file, synced. Raises OSError, also if it has fewer."""
    with contextlib.closing(target.create(new_path)) as file:
        while file.size < nbytes:
            data = source.read(path, file.size, min(SYNC_BYTES, nbytes - file.size))
            if not data:
                raise OSError(f"{source.describe(path)} became shorter while it was read")
            file.write(data)
        file.sync()
