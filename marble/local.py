"""The tables of a node in this process: `marble.open`, and what the Flight server answers from.

Rule 1: nothing is proposed that apply would refuse for its form. Whatever a caller can get wrong is a UsageError here, before
the log sees it; what depends on the order of the log (a table dropped meanwhile) is decided by apply, alike on every replica.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Literal, TypeVar

import pyarrow as pa

from marble._core.entry_batch import Proposal
from marble.config import HttpConfig
from marble.database import Database
from marble.env import SystemFiles
from marble.errors import OutcomeUnknownError, UnavailableError, UsageError
from marble.lsm import payload
from marble.lsm.files import TableFiles
from marble.lsm.keyrange import KeyRange
from marble.lsm.machine import TableMachine
from marble.lsm.view import TableView
from marble.node import GROUP, Node
from marble.options import NodeOptions
from marble.promises import Committed, IndexFuture, Lane, promise
from marble.requests import ScanRequest, TableChange
from marble.rows import conform, conform_keys
from marble.schema import TableInfo
from marble.table_options import TableOptions, fill
from marble.transport.wire import Stamp
from marble.types import EntryKind
from marble.web.watch import Watch

ANSWER_MARGIN_S: Final = 2.0
"""How much longer a caller waits than the engine's own deadlines, which give the better error."""

LOCAL_GROUP: Final = 1
"""The group that each node has for itself, of the tables that are not replicated."""

A = TypeVar("A")
B = TypeVar("B")


def _same(error: BaseException) -> BaseException:
    return error


def then(
    future: Future[A], function: Callable[[A], B], told: Callable[[BaseException], BaseException] = _same
) -> Future[B]:
    """A future of `function` applied to the result of `future`, or of `told` applied to its error."""
    answer: Future[B] = promise()

    def done(source: Future[A]) -> None:
        error = source.exception()
        if error is not None:
            answer.set_exception(told(error))
        else:
            answer.set_result(function(source.result()))

    future.add_done_callback(done)
    return answer


def scan_view(view: TableView, request: ScanRequest, batch_bytes_max: int | None = None) -> pa.RecordBatchReader:
    """What `request` asks for of `view`."""
    keys = KeyRange(request.lower or b"", request.upper)
    return view.scan(
        request.columns,
        request.filter,
        keys=keys,
        reverse=request.reverse,
        limit=request.limit,
        batch_bytes_max=batch_bytes_max,
    )


def _placed(info: TableInfo, local: bool) -> TableInfo:
    return dataclasses.replace(info, local=local)


class LocalBackend:
    """What `marble.database.Database` does, done on a node in this process. Thread-safe.

    Parameters
    ----------
    node
        A started node whose machine is `machine`.
    machine
        The tables.
    own
        The tables that are not replicated, the machine of group `LOCAL_GROUP`. None: there are none.
    lease_reads
        Whether a leader may answer linearizable reads out of its lease.
    watch
        What stops with the node, if somebody looks at it.
    """

    def __init__(
        self,
        node: Node,
        machine: TableMachine,
        own: TableMachine | None = None,
        *,
        lease_reads: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.node = node
        self.machine = machine
        self.own = own
        self.lease_reads = lease_reads
        self._watch = watch
        self._desk = node.desk(GROUP)
        self._closed = False

    def propose(
        self,
        kind: EntryKind,
        table_id: int,
        body: pa.Buffer | None,
        term: int | None = None,
        stamp: Stamp | None = None,
        lane: Lane | None = None,
        *,
        local: bool = False,
        future: Future[Any] | None = None,
    ) -> Future[Any]:
        """Offer one entry of `kind` for the log; see `Node.propose` for the rest. `stamp`: the client's, if any."""
        self._check_open()
        session, sequence = (0, 0) if stamp is None else (stamp.session, stamp.sequence)
        proposal = Proposal(kind, table_id, body, session, sequence)
        return self.node.propose(proposal, term, LOCAL_GROUP if local else GROUP, lane, future)

    def write_entry(
        self,
        table: TableInfo,
        batch: pa.RecordBatch,
        term: int | None = None,
        stamp: Stamp | None = None,
        lane: Lane | None = None,
    ) -> Future[Committed]:
        """Upsert the rows of `batch`, whoever it came from, as one entry."""
        body = payload.encode_rows(conform(fill(batch, table.schema, table.options), table))
        return self.propose(EntryKind.WRITE, table.id, body, term, stamp, lane)

    def delete_entry(
        self,
        table: TableInfo,
        keys: pa.RecordBatch,
        term: int | None = None,
        stamp: Stamp | None = None,
        lane: Lane | None = None,
    ) -> Future[Committed]:
        """Delete the rows with these `keys`, whoever they came from, as one entry."""
        body = payload.encode_rows(conform_keys(keys, table))
        return self.propose(EntryKind.DELETE, table.id, body, term, stamp, lane)

    def write(self, table: TableInfo, batch: pa.RecordBatch) -> Future[int]:
        # `Table` has conformed what it hands over.
        return self._changed(EntryKind.WRITE, table, payload.encode_rows(batch))

    def delete(self, table: TableInfo, keys: pa.RecordBatch) -> Future[int]:
        return self._changed(EntryKind.DELETE, table, payload.encode_rows(keys))

    def change(self, changes: Sequence[TableChange]) -> Future[int]:
        kind, table, body = payload.encode_changes(changes)
        return self.propose(kind, table, body, local=changes[0].table.local, future=IndexFuture())

    def _changed(self, kind: EntryKind, table: TableInfo, body: pa.Buffer) -> Future[int]:
        return self.propose(kind, table.id, body, local=table.local, future=IndexFuture())

    def create_table(
        self, name: str, schema: pa.Schema, key: Sequence[str], options: TableOptions, local: bool
    ) -> TableInfo:
        machine = self._machine_of(local)
        body = payload.encode_create_table(name, schema, key, options)
        committed = self._committed(self.propose(EntryKind.CREATE_TABLE, 0, body, local=local))
        return _placed(machine.table(committed.value), local)

    def drop_table(self, table: TableInfo) -> int:
        body = payload.encode_drop_table(table.name)
        return self._committed(self.propose(EntryKind.DROP_TABLE, 0, body, local=table.local)).index

    def tables(self) -> Sequence[TableInfo]:
        self._check_open()
        self._confirm()
        own = [] if self.own is None else [_placed(info, True) for info in self.own.tables()]
        # A name that both have, because it was given to both at once, means the replicated table.
        known = {info.name: info for info in (*own, *self.machine.tables())}
        return [known[name] for name in sorted(known)]

    def find(self, name: str) -> TableInfo | None:
        # A table of this node is found without asking others, who may not be there.
        own = [] if self.own is None else self.own.tables()
        mine = next((_placed(info, True) for info in own if info.name == name), None)
        if mine is None or any(info.name == name for info in self.machine.tables()):
            return next((info for info in self.tables() if info.name == name), None)
        self._check_open()
        return mine

    def view(self, table: TableInfo, consistency: str, at_index: int | None = None) -> TableView:
        """The table as of now: of the whole cluster ("linearizable") or of what this replica has applied ("local").

        `at_index`: as it was after that entry instead. What is linearizable then is only that this is known here.
        """
        self._check_open()
        machine = self._machine_of(table.local)
        if consistency == "linearizable" and (at_index is None or at_index > machine.applied_index):
            self._confirm(LOCAL_GROUP if table.local else GROUP)
        return machine.read(table.id, at_index)

    def get_row(
        self, table: TableInfo, names: tuple[str, ...], key: tuple[object, ...], consistency: str
    ) -> dict[str, object] | Literal[False] | None:
        # As `view` does, step by step: a call costs about as much as finding the row.
        if self._closed or table.local:
            return self.view(table, consistency).get_row(names, key)
        if not self._desk.alone and consistency == "linearizable":
            self._confirm()
        return self.machine.read(table.id).get_row(names, key)

    def get_many(
        self, table: TableInfo, keys: pa.RecordBatch, consistency: str, at_index: int | None
    ) -> pa.RecordBatch:
        return self.view(table, consistency, at_index).get_many(keys)

    def scan(self, table: TableInfo, request: ScanRequest) -> pa.RecordBatchReader:
        return scan_view(self.view(table, request.consistency, request.at_index), request)

    def _machine_of(self, local: bool) -> TableMachine:
        if not local:
            return self.machine
        if self.own is None:
            raise UsageError(
                "this node has no tables of its own: replicated=False is for marble.open and RaftServer.database"
            )
        return self.own

    def status(self) -> dict[str, Any]:
        return self.node.status() | ({} if self._watch is None else {"page": self._watch.url})

    def checkpoint(self, path: str | os.PathLike[str]) -> int:
        self._check_open()
        return self.node.checkpoints.place(path)

    def close(self) -> None:
        self._closed = True
        if self._watch is not None and not self.node.is_elsewhere:
            self._watch.stop()
        self.node.stop()

    def _confirm(self, group: int = GROUP) -> None:
        """Wait until this node has applied what was committed anywhere when the call came."""
        if self.node.decides_alone(group):
            return
        try:
            self.node.read_index(group, lease=self.lease_reads).result(
                self.node.options.read_timeout_s + ANSWER_MARGIN_S
            )
        except TimeoutError:
            raise UnavailableError("the engine does not answer (a disk that hangs?)") from None

    def _committed(self, future: Future[Committed]) -> Committed:
        try:
            return future.result(2 * self.node.options.propose_timeout_s + ANSWER_MARGIN_S)
        except TimeoutError:
            raise OutcomeUnknownError("the engine does not answer (a disk that hangs?): it may take effect") from None

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the database is closed")


def _give_back(node: Node, resources: contextlib.ExitStack) -> None:
    """A database has gone, or its process ends. In a forked child it is the parent's, which goes on with it."""
    if not node.is_elsewhere:
        resources.close()


def open(  # noqa: A001
    path: str | os.PathLike[str],
    *,
    max_log_size: int | None = None,
    max_entry_size: int = 16 * 1024 * 1024,
    snapshot_distance: int = 10_000,
    retention: int = 0,
    http: str | None = None,
) -> Database:
    """Open a database in a directory of this machine: a Raft cluster of one, no server.

    The log and the guarantees are those of a cluster: a write that has returned is on the disk.

    Parameters
    ----------
    path
        The data directory, made if missing. One process at a time may have it open.
    max_log_size
        In bytes; writes are refused with UnavailableError while the log is larger. None: no limit.
    max_entry_size
        In bytes; a larger batch is refused with UsageError.
    snapshot_distance
        Entries between two snapshots, which let the log forget what lies behind them.
    retention
        For how many entries back the tables can be read as they were (``at_index=``). It keeps their memory and files, too.
    http
        ``host:port`` for health, metrics and a page in a browser, e.g. ``"127.0.0.1:0"`` for any free port; its URL is the
        ``page`` of `Database.status`. None: no such port.

    Returns
    -------
    Database
        To be closed, or used with ``with``.

    Raises
    ------
    UnavailableError
        If the directory is in use.
    UsageError
        If the directory belongs to a node of a cluster, or cannot be made.
    CorruptionError
        If the log is damaged: names the file and the offset.
    """
    files = SystemFiles(path)
    machine = TableMachine(files=TableFiles(files), retention=retention)
    own = TableMachine(files=TableFiles(files, LOCAL_GROUP), retention=retention)
    options = NodeOptions(
        cluster_id="embedded",
        node_id=1,
        endpoints={1: "embedded"},
        log_bytes_max=max_log_size,
        entry_bytes_max=max_entry_size,
        snapshot_distance=snapshot_distance,
    )
    try:
        node = Node(options, files, {GROUP: machine, LOCAL_GROUP: own}, alone=(LOCAL_GROUP,))
    except (FileNotFoundError, NotADirectoryError, FileExistsError, PermissionError) as error:
        raise UsageError(f"{os.fspath(path)!r} cannot be a data directory: {error.strerror}") from None
    with contextlib.ExitStack() as stack:
        stack.callback(node.stop)
        node.start()
        watch = None
        if http is not None:
            watch = Watch(node, options.node_id, path, http=HttpConfig(http))
            stack.callback(watch.stop)
            watch.start()
        backend = LocalBackend(node, machine, own, watch=watch)
        # Whoever forgets to close, but drops the database and its tables, gives the directory back all the same.
        weakref.finalize(backend, _give_back, node, stack.pop_all())
    return Database(backend)
