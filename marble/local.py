"""The tables of a node in this process: `marble.open`, and what the Flight server answers from.

Rule 1: nothing is proposed that apply would refuse for its form. Whatever a caller can get wrong is a UsageError here, before
the log sees it; what depends on the order of the log (a table dropped meanwhile) is decided by apply, alike on every replica.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.entry_batch import Proposal
from marble.database import Database
from marble.env import SystemFiles
from marble.errors import OutcomeUnknownError, UnavailableError, UsageError
from marble.lsm import payload
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.view import TableView
from marble.node import Node
from marble.options import NodeOptions
from marble.promises import Committed, Lane, promise
from marble.schema import TableInfo, conform, conform_keys
from marble.transport.wire import Stamp
from marble.types import EntryKind

ANSWER_MARGIN_S: Final = 2.0
"""How much longer a caller waits than the engine's own deadlines, which give the better error."""

A = TypeVar("A")
B = TypeVar("B")


def then(future: Future[A], function: Callable[[A], B]) -> Future[B]:
    """A future of `function` applied to the result of `future`; errors pass through."""
    answer: Future[B] = promise()

    def done(source: Future[A]) -> None:
        error = source.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(function(source.result()))

    future.add_done_callback(done)
    return answer


def _index(committed: Committed) -> int:
    return committed.index


class LocalBackend:
    """What `marble.database.Database` does, done on a node in this process. Thread-safe.

    Parameters
    ----------
    node
        A started node whose machine is `machine`.
    machine
        The tables.
    lease_reads
        Whether a leader may answer linearizable reads out of its lease.
    """

    def __init__(self, node: Node, machine: TableMachine, *, lease_reads: bool = False) -> None:
        self.node = node
        self.machine = machine
        self.lease_reads = lease_reads
        self._closed = False

    def propose(
        self,
        kind: EntryKind,
        table_id: int,
        body: pa.Buffer | None,
        term: int | None = None,
        stamp: Stamp | None = None,
        lane: Lane | None = None,
    ) -> Future[Committed]:
        """Offer one entry of `kind` for the log; see `Node.propose` for `term` and `lane`. `stamp`: the client's, if any."""
        self._check_open()
        session, sequence = (0, 0) if stamp is None else (stamp.session, stamp.sequence)
        return self.node.propose(Proposal(kind, table_id, body, session, sequence), term, lane=lane)

    def write_entry(
        self,
        table: TableInfo,
        batch: pa.RecordBatch,
        term: int | None = None,
        stamp: Stamp | None = None,
        lane: Lane | None = None,
    ) -> Future[Committed]:
        """Upsert the rows of `batch`, whoever it came from, as one entry."""
        body = payload.encode_rows(conform(batch, table))
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
        return then(self.propose(EntryKind.WRITE, table.id, payload.encode_rows(batch)), _index)

    def delete(self, table: TableInfo, keys: pa.RecordBatch) -> Future[int]:
        return then(self.propose(EntryKind.DELETE, table.id, payload.encode_rows(keys)), _index)

    def create_table(self, name: str, schema: pa.Schema, key: Sequence[str]) -> TableInfo:
        body = payload.encode_create_table(name, schema, key)
        committed = self._committed(self.propose(EntryKind.CREATE_TABLE, 0, body))
        return self.machine.read(committed.value).info

    def drop_table(self, name: str) -> int:
        return self._committed(self.propose(EntryKind.DROP_TABLE, 0, payload.encode_drop_table(name))).index

    def tables(self) -> Sequence[TableInfo]:
        self._check_open()
        self._confirm()
        return self.machine.tables()

    def view(self, table: TableInfo, consistency: str) -> TableView:
        """The table as of now: of the whole cluster ("linearizable") or of what this replica has applied ("local")."""
        self._check_open()
        if consistency == "linearizable":
            self._confirm()
        return self.machine.read(table.id)

    def get_many(self, table: TableInfo, keys: pa.RecordBatch, consistency: str) -> pa.RecordBatch:
        return self.view(table, consistency).get_many(keys)

    def scan(
        self,
        table: TableInfo,
        columns: Sequence[str] | None,
        filter: pc.Expression | None,  # noqa: A002
        consistency: str,
    ) -> pa.RecordBatchReader:
        return self.view(table, consistency).scan(columns, filter)

    def status(self) -> dict[str, Any]:
        return self.node.status()

    def checkpoint(self, path: str | os.PathLike[str]) -> int:
        self._check_open()
        return self.node.checkpoints.place(path)

    def close(self) -> None:
        self._closed = True
        self.node.stop()

    def _confirm(self) -> None:
        """Wait until this node has applied what was committed anywhere when the call came."""
        try:
            self.node.read_index(lease=self.lease_reads).result(self.node.options.read_timeout_s + ANSWER_MARGIN_S)
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


def open(  # noqa: A001
    path: str | os.PathLike[str],
    *,
    max_log_size: int | None = None,
    max_entry_size: int = 16 * 1024 * 1024,
    snapshot_distance: int = 10_000,
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
    machine = TableMachine(files=TableFiles(files))
    options = NodeOptions(
        cluster_id="embedded",
        node_id=1,
        endpoints={1: "embedded"},
        log_bytes_max=max_log_size,
        entry_bytes_max=max_entry_size,
        snapshot_distance=snapshot_distance,
    )
    try:
        node = Node(options, files, machine)
    except (FileNotFoundError, NotADirectoryError, FileExistsError, PermissionError) as error:
        raise UsageError(f"{os.fspath(path)!r} cannot be a data directory: {error.strerror}") from None
    node.start()
    backend = LocalBackend(node, machine)
    # Whoever forgets to close, but drops the database and its tables, gives the directory back all the same.
    weakref.finalize(backend, node.stop)
    return Database(backend)
