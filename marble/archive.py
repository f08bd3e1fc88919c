"""Backups and directories restored from them, on whatever `marble.env.Files` there are: a disk, or a simulated one.

What `marble.backup` does for users, without URLs, paths and the network. `parent` is where the new directory is made, `name` what it is to
be called there.

Rule 1: a backup is read back and verified before it gets its name, and so is what is restored. Nothing that exists is written over.
Rule 2: while it is made, it is called otherwise, and has no identity until all else in it is durable. Without one `verify` calls it
damaged, and neither a node nor a restore takes it. So what a crash leaves is whole, or nobody believes any of it.
Rule 3: a restored directory belongs to a new cluster. Its log holds the entries of the backup, but none of them changes the members: who
these are was said when it was restored. So no vote and no promise of the old cluster is carried on.
Rule 4: every entry that is in the backup's log takes effect. Those at its end may not have been committed when it was made; nobody was told
that they would not be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

import pyarrow as pa

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.checkpoint import DIRECTORIES, checked_listing, copy, finish
from marble.env import Files, Random
from marble.errors import InvariantError, ProtocolError, UsageError
from marble.identity import IDENTITY_FILE, LOCK_FILE, make_identity, unseal
from marble.logstore import contents, segment
from marble.logstore.log import Log, LogOptions
from marble.logstore.replay import GroupState
from marble.logstore.snapshot_file import FileReader, SnapshotInfo
from marble.logstore.snapshots import SnapshotStore, snapshot_path
from marble.members import check_endpoints, check_members
from marble.recovery import newest
from marble.types import EntryKind, HardState, Members, SnapshotMeta
from marble.verify import Verified, verify

PIECE_BYTES: Final = 4 * 1024 * 1024
"""What is asked for at a time of a backup that is fetched."""

IDENTITY_BYTES_MAX: Final = 64 * 1024
"""Of the identity of another node, which is kept in memory until all else is there."""

UNFINISHED: Final = ".unfinished"
"""Ends the name of what is being made."""

Progress = Callable[[str], None]
"""Called with the path of each file before it is read or written."""


class Source(Protocol):
    """A node that runs, and a checkpoint of it."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    def begin(self) -> Mapping[str, object]:
        """Have it make the checkpoint. Its files with their lengths, as the node says."""
        ...

    def read(self, path: str, offset: int, bytes_max: int) -> bytes | memoryview:
        """Some bytes of one of these."""
        ...

    def end(self) -> None:
        """Have it drop the checkpoint."""
        ...


def back_up_directory(source: Files, parent: Files, name: str, told: Progress) -> Verified:
    """Make a backup of a data directory that no node uses; errors as those of `marble.backup.backup`."""
    check_existing(source)
    with in_peace(source), _new_directory(parent, name) as target:
        for folder in DIRECTORIES:
            target.make_directory(folder)
            for each in source.list(folder) if source.exists(folder) else ():
                path = f"{folder}/{each}"
                if not each.endswith((".tmp", ".part")):
                    told(path)
                    copy(source, path, target, path, source.size(path))
        finish(target, source.read(IDENTITY_FILE))
        return _verified(target, told)


def back_up_node(source: Source, parent: Files, name: str, told: Progress) -> Verified:
    """Make a backup of a node that runs; errors as those of `marble.backup.backup`, and ProtocolError: the node gives nonsense."""
    with _new_directory(parent, name) as target:
        listed, identity = checked_listing(source.begin(), source.name), b""
        try:
            if not 0 < listed.get(IDENTITY_FILE, 0) <= IDENTITY_BYTES_MAX:
                raise ProtocolError(f"{source.name} did not say whose data these are")
            for folder in DIRECTORIES:
                target.make_directory(folder)
            for path, nbytes in listed.items():
                told(path)
                if path == IDENTITY_FILE:
                    identity = b"".join(_pieces(source, path, nbytes))
                    continue
                with contextlib.closing(target.create(path)) as file:
                    for data in _pieces(source, path, nbytes):
                        file.write(data)
                        file.sync()
        finally:
            source.end()
        finish(target, identity)
        return _verified(target, told)


def _pieces(source: Source, path: str, nbytes: int) -> Iterator[bytes | memoryview]:
    got = 0
    while got < nbytes:
        data = source.read(path, got, min(PIECE_BYTES, nbytes - got))
        if not 0 < len(data) <= nbytes - got:
            raise ProtocolError(f"{source.name} sent {len(data)} bytes of {path}, which has {nbytes}")
        yield data
        got += len(data)


def restore_directory(
    old: Files,
    parent: Files,
    name: str,
    cluster_id: str,
    places: Mapping[int, str],
    node_id: int | None,
    told: Progress,
    random: Random | None = None,
) -> Verified:
    """Make a data directory of a new cluster; parameters and errors as those of `marble.backup.restore`, `random` as of `identity.bind`."""
    members = Members(tuple(sorted(places or {1: ""})))
    try:
        check_members(members)
        check_endpoints(members, places)
    except ProtocolError as error:
        raise UsageError(f"these cannot be the members of a cluster: {error}") from None
    chosen = members.voters[0] if node_id is None else node_id
    if chosen not in members.voters:
        raise UsageError(f"node {chosen} is none of the members {list(members.voters)}")
    check_existing(old)
    with in_peace(old), _new_directory(parent, name) as new:
        read = _verified(old, told)
        identity = unseal(old.read(IDENTITY_FILE), "identity file", old.describe(IDENTITY_FILE))
        if identity["cluster_id"] == cluster_id and identity["voters"] != [identity["node_id"]]:
            raise UsageError(
                f"the backup is of cluster {cluster_id!r} itself, whose nodes may live: choose another name"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(_disk_errors())
            log = stack.enter_context(contextlib.closing(Log.open(old, LogOptions(cache_bytes_max=0), writable=False)))
            fresh = stack.enter_context(contextlib.closing(Log.open(new)))
            for group in sorted({*log.groups, *read.snapshots}):
                told(f"group {group}")
                own = _members_of(group, read, identity, members, chosen)
                found_at = {node: places[node] for node in own.voters if node in places}
                _restore_group(group, old, log, new, fresh, read, own, found_at)
        _make_durable(new)
        make_identity(new, cluster_id, chosen, members.voters, random)
        return _verified(new, told)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """A log that its disk fails stops its node. Here nothing relies upon it, so the disk's own word is what the user needs."""
    try:
        yield
    except InvariantError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def _make_durable(files: Files) -> None:
    """What a node leaves to chance: the log's mark is never synced, and without it damage at its end is not told from a torn tail."""
    if files.exists(segment.SYNCED_PATH):
        with contextlib.closing(files.open_append(segment.SYNCED_PATH)) as mark:
            mark.sync()
    for folder in DIRECTORIES:
        if files.exists(folder):
            files.sync_directory(folder)


def _verified(files: Files, told: Progress) -> Verified:
    found = verify(files, told)
    found.raise_for_damage()
    return found


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


# -- directories ---------------------------------------------------------------------------------------------------------


def check_existing(files: Files) -> None:
    """Raise UsageError unless `files` is a data directory or a backup."""
    if not files.exists(IDENTITY_FILE):
        raise UsageError(f"{files.describe('')} is neither a node's data directory nor a backup")


@contextlib.contextmanager
def in_peace(files: Files) -> Iterator[None]:
    """Keep nodes away from a data directory. A backup has no lock: nobody uses it."""
    if files.exists(LOCK_FILE):
        with files.lock(LOCK_FILE):
            yield
    else:
        yield


@contextlib.contextmanager
def _new_directory(parent: Files, name: str) -> Iterator[Files]:
    """A directory to be filled, which gets its name if that succeeds, and goes if it does not."""
    if not _is_free(parent, name):
        raise UsageError(f"{parent.describe(name)} exists already: choose another place")
    unfinished = name + UNFINISHED
    _remove(parent, unfinished)
    parent.make_directory(unfinished)
    files = parent.below(unfinished)
    try:
        yield files
        if files.exists(LOCK_FILE):
            files.remove(LOCK_FILE)
        files.sync_directory("")
        parent.rename(unfinished, name)
        parent.sync_directory("")
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(parent, unfinished)
        raise


def _is_free(parent: Files, name: str) -> bool:
    try:
        return not parent.exists(name) or not parent.list(name)
    except NotADirectoryError:
        return False


def _remove(parent: Files, name: str) -> None:
    """Remove a directory that nobody is to believe; its identity first (Rule 2)."""
    identity = f"{name}/{IDENTITY_FILE}"
    if parent.exists(identity):
        parent.remove(identity)
        parent.sync_directory(name)
    parent.remove_tree(name)
