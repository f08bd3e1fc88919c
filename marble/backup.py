"""Backups: made of a directory or of a running node, and made a node again: ``marble backup`` and ``marble restore``.

A backup is a checkpoint (`marble.checkpoint`) in a place of its own: identity, log, snapshots, files of tables, and a manifest.

Rule 1: a backup is read back and verified before it gets its name, and so is what is restored. Nothing that exists is
written over.
Rule 2: a restored directory belongs to a new cluster. Its log holds the entries of the backup, but none of them changes the
members: who these are was said when it was restored. So no vote and no promise of the old cluster is carried on.
Rule 3: every entry that is in the backup's log takes effect. Those at its end may not have been committed when it was made;
nobody was told that they would not be.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.checkpoint import DIRECTORIES, checked_listing, copy, put, write_manifest
from marble.client import ClientOptions, RemoteBackend
from marble.config import parse_url
from marble.env import Files, SystemFiles
from marble.errors import ProtocolError, UnavailableError, UsageError
from marble.identity import IDENTITY_FILE, LOCK_FILE, bind, unseal
from marble.logstore import contents
from marble.logstore.log import Log, LogOptions
from marble.logstore.replay import GroupState
from marble.logstore.snapshot_file import FileReader, SnapshotInfo
from marble.logstore.snapshots import SnapshotStore, snapshot_path
from marble.members import check_endpoints, check_members
from marble.recovery import newest
from marble.transport.papers import credentials_for
from marble.transport.wire import encode_json
from marble.types import EntryKind, HardState, Members, SnapshotMeta
from marble.verify import Verified, verify

PIECE_BYTES: Final = 4 * 1024 * 1024
"""What one answer of a node carries of a backup."""

_UNFINISHED: Final = ".unfinished"

Progress = Callable[[str], None]
"""Called with the path of each file before it is read or written."""


def backup(
    source: str | os.PathLike[str], target: str | os.PathLike[str], progress: Progress | None = None
) -> Verified:
    """Make a backup of a data directory that no node uses, or of a running node.

    Parameters
    ----------
    source
        The directory, or ``grpc://host:port``: the first node of the URL that answers. That has applied by then what was
        acknowledged anywhere before the call.
    target
        A new directory.
    progress
        See there.

    Returns
    -------
    Verified
        What the backup holds.

    Raises
    ------
    UsageError
        There is no such directory, or `target` exists.
    UnavailableError
        A node uses the directory; or none could be reached.
    CorruptionError
        Something in `source` is damaged. There is no backup.
    OSError
        A disk failed or is full.
    """
    told = progress or (lambda path: None)
    with _new_directory(target) as place:
        files = SystemFiles(place)
        if os.fspath(source).startswith(("grpc://", "grpc+")):
            _fetch(os.fspath(source), files, told)
        else:
            _copy_directory(_existing(source), files, told)
        found = verify(files, told)
        found.raise_for_damage()
    return found


def restore(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    cluster_id: str,
    nodes: Mapping[int, str] | None = None,
    node_id: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Make a data directory of a new cluster from a backup, or from a data directory that no node uses.

    Parameters
    ----------
    source
        The backup. It is only read.
    target
        A new directory.
    cluster_id
        Of the new cluster: another name than the old one's, so that no node of that takes it for its own. What `marble.open`
        opens is a cluster called "embedded" of node 1 alone.
    nodes
        Who the members are, ``host:port`` by node id. None: node 1 alone. With several, each needs a directory of its own,
        restored from the same backup in the same way but for `node_id`.
    node_id
        Whose directory this is: the smallest of `nodes`, if None.
    progress
        See there.

    Returns
    -------
    Verified
        What the directory holds.

    Raises
    ------
    UsageError
        An argument is wrong, or `target` exists.
    UnavailableError
        A node uses `source`.
    CorruptionError
        Something in `source` is damaged. There is no new directory.
    OSError
        A disk failed or is full.
    """
    places = dict(nodes or {})
    members = Members(tuple(sorted(places or {1: ""})))
    try:
        check_members(members)
        check_endpoints(members, places)
    except ProtocolError as error:
        raise UsageError(f"these cannot be the members of a cluster: {error}") from None
    chosen = members.voters[0] if node_id is None else node_id
    if chosen not in members.voters:
        raise UsageError(f"node {chosen} is none of the members {list(members.voters)}")
    old = _existing(source)
    told = progress or (lambda path: None)
    with _in_peace(old), _new_directory(target) as place:
        read = verify(old, told)
        read.raise_for_damage()
        identity = unseal(old.read(IDENTITY_FILE), "identity file", old.describe(IDENTITY_FILE))
        if identity["cluster_id"] == cluster_id and identity["voters"] != [identity["node_id"]]:
            raise UsageError(
                f"the backup is of cluster {cluster_id!r} itself, whose nodes may live: choose another name"
            )
        new = SystemFiles(place)
        bind(new, cluster_id, chosen, members.voters)
        log = Log.open(old, LogOptions(cache_bytes_max=0), writable=False)
        with contextlib.closing(log), contextlib.closing(Log.open(new)) as fresh:
            for group in sorted({*log.groups, *read.snapshots}):
                told(f"group {group}")
                own = _members_of(group, read, identity, members, chosen)
                found_at = {node: places[node] for node in own.voters if node in places}
                _restore_group(group, old, log, new, fresh, read, own, found_at)
        found = verify(new, told)
        found.raise_for_damage()
    return found


def verify_directory(path: str | os.PathLike[str], progress: Progress | None = None) -> Verified:
    """Check every byte of a data directory that no node uses, or of a backup. See `marble.verify`.

    Raises
    ------
    UsageError
        There is no such directory.
    UnavailableError
        A node uses it.
    """
    if not Path(path).is_dir():
        raise UsageError(f"there is no directory {os.fspath(path)}")
    files = SystemFiles(path)
    with _in_peace(files):
        return verify(files, progress)


# -- restoring -----------------------------------------------------------------------------------------------------------


def _members_of(group: int, read: Verified, identity: Mapping[str, object], members: Members, chosen: int) -> Members:
    """Who takes part in `group` from now on: a group of its node alone stays that."""
    infos = read.snapshots.get(group)
    before = infos[-1].members.all if infos else tuple(identity["voters"])  # type: ignore[arg-type]
    alone = group != 0 and before == (identity["node_id"],)
    return Members((chosen,)) if alone else members


def _restore_group(
    group: int,
    old: Files,
    log: Log,
    new: Files,
    fresh: Log,
    read: Verified,
    members: Members,
    places: Mapping[int, str],
) -> None:
    """Write the snapshot of a group as one of `members`, with its files, and the log behind it."""
    state = log.groups.get(group)
    info = None if state is None else newest(read.snapshots.get(group, []), state.term_index)
    if info is None and state is None:
        info = read.snapshots[group][-1]  # A log without the group: nothing came behind the snapshot.
    if info is not None:
        _restore_snapshot(info, old, new, members, places)
        fresh.start_after(group, info.index, info.term)
    if state is not None:
        _restore_log(group, state, 0 if info is None else info.index, log, fresh)


def _restore_snapshot(info: SnapshotInfo, old: Files, new: Files, members: Members, places: Mapping[int, str]) -> None:
    reader = FileReader(old, snapshot_path(info))
    store = SnapshotStore(new, info.group)
    new.make_directory(contents.DIRECTORY)
    for ref in reader.refs():
        path = store.contents.path(ref.name)
        if not new.exists(path):
            copy(old, path, new, path, ref.nbytes)
    new.sync_directory(contents.DIRECTORY)
    store.write(SnapshotMeta(info.index, info.term, members), places, reader.rows())


def _restore_log(group: int, state: GroupState, after: int, log: Log, fresh: Log) -> None:
    """Append what came behind entry `after`, all of it committed."""
    last = max(after, state.last_index)
    for batch in log.replay(group, after + 1, state.last_index + 1):
        fresh.append(group, None, _without_changes(batch, group))
        fresh.sync()
    if last:
        fresh.append(group, HardState(term=state.term_index.term_at(last), vote=0, commit=last), None)
        fresh.sync()


def _without_changes(batch: pa.RecordBatch, group: int) -> pa.RecordBatch:
    """`batch` with a no-op in the place of each entry that changes the members."""
    changes = entry_batch.changes(batch)
    if not changes:
        return batch
    first = batch.column("index")[0].as_py()
    parts: list[pa.RecordBatch] = []
    row = 0
    for index in changes:
        at = index - first
        if at > row:
            parts.append(batch.slice(row, at - row))
        term, time_us = batch.column("term")[at].as_py(), batch.column("time_us")[at].as_py()
        parts.append(entry_batch.build(group, index, term, [Proposal(EntryKind.NOOP, 0, None)], time_us))
        row = at + 1
    if row < batch.num_rows:
        parts.append(batch.slice(row))
    return entry_batch.concat(parts)


# -- making a backup -----------------------------------------------------------------------------------------------------


def _copy_directory(source: Files, target: Files, told: Progress) -> None:
    with _in_peace(source):
        for folder in DIRECTORIES:
            target.make_directory(folder)
            for name in source.list(folder) if source.exists(folder) else ():
                path = f"{folder}/{name}"
                if not name.endswith((".tmp", ".part")):
                    told(path)
                    copy(source, path, target, path, source.size(path))
        put(target, IDENTITY_FILE, source.read(IDENTITY_FILE))
        write_manifest(target)


def _fetch(url: str, target: Files, told: Progress) -> None:
    """Have a running node make a checkpoint, and fetch it."""
    endpoints = parse_url(url)
    backend = RemoteBackend(endpoints, ClientOptions(credentials=credentials_for(url)))
    with contextlib.closing(backend):
        endpoint, answer = _begin(backend, endpoints)
        token, listed = answer.get("token"), answer.get("files")
        if not isinstance(token, str) or not isinstance(listed, dict):
            raise ProtocolError(f"{endpoint} did not say what a backup consists of")
        try:
            for folder in DIRECTORIES:
                target.make_directory(folder)
            for path, nbytes in checked_listing(listed, endpoint).items():
                told(path)
                with contextlib.closing(target.create(path)) as file:
                    while file.size < nbytes:
                        asked = {"token": token, "path": path, "offset": file.size, "bytes": PIECE_BYTES}
                        data = backend.ask_bytes(endpoint, "read_backup", encode_json(asked))
                        if not 0 < len(data) <= nbytes - file.size:
                            raise ProtocolError(f"{endpoint} sent {len(data)} bytes of {path}, which has {nbytes}")
                        file.write(data)
                        file.sync()
        finally:
            backend.ask_one(endpoint, "end_backup", encode_json({"token": token}))
    write_manifest(target)


def _begin(backend: RemoteBackend, endpoints: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The first node that can make a backup, and its answer."""
    for endpoint in endpoints[:-1]:
        with contextlib.suppress(UnavailableError):
            return endpoint, backend.ask_one(endpoint, "begin_backup", b"")
    return endpoints[-1], backend.ask_one(endpoints[-1], "begin_backup", b"")


# -- directories ---------------------------------------------------------------------------------------------------------


def _existing(path: str | os.PathLike[str]) -> SystemFiles:
    """A data directory or a backup."""
    if not Path(path).is_dir() or not (Path(path) / IDENTITY_FILE).exists():
        raise UsageError(f"{os.fspath(path)} is neither a node's data directory nor a backup")
    return SystemFiles(path)


@contextlib.contextmanager
def _in_peace(files: Files) -> Iterator[None]:
    """Keep nodes away from a data directory. A backup has no lock: nobody uses it."""
    if files.exists(LOCK_FILE):
        with files.lock(LOCK_FILE):
            yield
    else:
        yield


@contextlib.contextmanager
def _new_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to be filled, which gets its name if that succeeds, and goes if it does not."""
    place = Path(target).absolute()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{place} exists already: choose another place")
    unfinished = place.with_name(place.name + _UNFINISHED)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    SystemFiles(unfinished).make_directory("")
    try:
        yield unfinished
        (unfinished / LOCK_FILE).unlink(missing_ok=True)
        os.rename(unfinished, place)
        SystemFiles(place.parent).sync_directory("")
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
