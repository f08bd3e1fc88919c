"""A cluster seen from outside: `marble.connect` finds the leader, follows it, and retries what is safe to retry.

Rule 1: reads are repeated freely until their deadline. What changes something carries a stamp: its number in a session, which the
replicas know. It is repeated under the same stamp until its deadline, over lost answers and changes of leader, and takes effect once.
`OutcomeUnknownError` is left for what has no answer even then.

There is a session for each stream of writes (a table, or its deletes) and one for actions, so that none waits for another. They open
with the first write, are closed by `close`, and end by themselves when nothing was written for an hour: a new one is then opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.flight as fl

from marble._core.entry_batch import decode_payload, encode_payload
from marble.config import parse_url
from marble.contacts import Contacts
from marble.database import Database
from marble.errors import (
    ForbiddenError,
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    ProtocolError,
    UnauthenticatedError,
    UnavailableError,
    UsageError,
)
from marble.filters import columns_read, filter_batches, first_rows
from marble.lsm import payload
from marble.lsm.keyrange import KeyRange
from marble.lsm.pushdown import push_down
from marble.orders import (
    ATTEMPT_TIMEOUT_S,
    RETRY_WAIT_MIN_S,
    Backoff,
    Orders,
    act,
    as_object,
    no_leader,
    open_session,
)
from marble.requests import ScanRequest, TableChange
from marble.schema import TableInfo
from marble.table_options import TableOptions
from marble.transport.faults import from_flight_error
from marble.transport.papers import credentials_for
from marble.transport.pool import ClientPool
from marble.transport.put import STREAM_ERRORS, PutStream
from marble.transport.security import PLAIN, Credentials
from marble.transport.tickets import encode_ticket
from marble.transport.wire import (
    DELETE,
    GET,
    UPSERT,
    Ack,
    call_options,
    decode_table_info,
    decode_tables,
    encode_json,
    encode_schema,
    options_to_json,
)
from marble.vigil import Vigil

T = TypeVar("T")

SCAN_TIMEOUT_S: Final = 3600.0
"""How long a scan may take in all."""

FOLLOW_MAX: Final = 3
"""How often a node's word about who leads is followed before all are asked anew."""

CLOSE_SESSION_TIMEOUT_S: Final = 1.0
"""How long `close` waits for the end of a session, which would also end by itself."""

REFRESH_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Deadlines of a client, in seconds, and who it is."""

    timeout_s: float = 30.0
    """After this a read ends in UnavailableError, and a write in UnavailableError (nothing was written) or OutcomeUnknownError."""

    credentials: Credentials = PLAIN
    """What the client brings to the nodes, and what it wants of them."""


class RemoteBackend:
    """What `marble.database.Database` does, done over Flight. Thread-safe.


    Parameters
    ----------
    endpoints
        ``host:port`` of some or all nodes. Others are learnt from them, for writes and linearizable reads.
    options
        Deadlines.
    """

    def __init__(self, endpoints: Sequence[str], options: ClientOptions) -> None:
        self._contacts = Contacts(endpoints)
        self._gather_bytes_max = 0
        self._options = options
        self._lock = threading.Lock()
        self._clients = ClientPool(lambda: options.credentials)
        self._puts: dict[tuple[int, str], PutStream] = {}
        self._closed = threading.Event()
        self._orders = Orders(self._locate, options.timeout_s, self._closed)
        self._process = os.getpid()
        self._vigil = Vigil(self._contacts, self._clients, self._closed, self._open_puts, self._refresh)

    # -- writes ------------------------------------------------------------------------------------------------------

    def write(self, table: TableInfo, batch: pa.RecordBatch) -> Future[int]:
        return self._put(table, UPSERT, table.schema, batch)

    def delete(self, table: TableInfo, keys: pa.RecordBatch) -> Future[int]:
        return self._put(table, DELETE, table.key_schema, keys)

    def _put(self, table: TableInfo, verb: str, schema: pa.Schema, batch: pa.RecordBatch) -> Future[int]:
        with self._lock:
            self._check_open()
            stream = self._puts.get((table.id, verb))
            if stream is None:
                stream = PutStream(
                    (table.name, verb),
                    schema,
                    self._locate,
                    self._options.timeout_s,
                    open_session=open_session,
                    # A value that does not fit what is there already must not fail the writes of others.
                    gather_bytes_max=(lambda: 0) if table.options.merge else (lambda: self._gather_bytes_max),
                )
                self._puts[table.id, verb] = stream
            self._vigil.start()
        answer: Future[int] = Future()
        answer.set_running_or_notify_cancel()

        def done(source: Future[Ack]) -> None:
            error = source.exception()
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(source.result().index)

        stream.write(batch).add_done_callback(done)
        return answer

    def _locate(self, deadline: float, failed: bool) -> fl.FlightClient:
        """The client of the leader. `failed`: the last guess did not work out."""
        contacts = self._contacts
        if failed:
            contacts.leader = None
        backoff = Backoff(deadline, self._closed)
        while True:
            silent: list[str] = []
            followed = 0
            candidates = contacts.candidates()
            while candidates:
                endpoint = candidates.pop(0)
                timeout_s = max(RETRY_WAIT_MIN_S, min(contacts.patience_s(endpoint), deadline - time.monotonic()))
                try:
                    status = as_object(self._action(endpoint, "status", b"", timeout_s))
                except MarbleError as failure:
                    # Waiting does not give the client other rights.
                    if isinstance(failure, UnauthenticatedError | ForbiddenError) and not candidates:
                        raise
                    silent.append(str(failure))
                    self._vigil.lose(endpoint)
                    continue
                contacts.answered(endpoint)
                self._learn(status)
                if status["role"] == "leader":
                    contacts.leader = endpoint
                    return self._client(endpoint)
                named = status["leader_endpoint"]
                # Its followers may not have noticed yet that it is gone.
                if named and followed < FOLLOW_MAX and not contacts.is_silent(named):
                    # Ask it next; nodes whose news is old may name one another for a while.
                    followed += 1
                    candidates = [named, *(each for each in candidates if each != named)]
            contacts.leader = None
            backoff.wait(UnavailableError(f"no node took the write: {no_leader(contacts.candidates(), silent)}"))

    def _learn(self, status: dict[str, Any]) -> None:
        self._contacts.learn(status)
        self._gather_bytes_max = status.get("max_entry_size", 0) // 2

    # -- catalog and actions -------------------------------------------------------------------------------------------

    def create_table(
        self, name: str, schema: pa.Schema, key: Sequence[str], options: TableOptions, local: bool
    ) -> TableInfo:
        if local:
            raise UsageError(
                f"table {name!r}: a client of a cluster cannot have tables that are not replicated: replicated=False is for "
                "marble.open and RaftServer.database"
            )
        body = {"name": name, "key": list(key), "schema": encode_schema(schema), "options": options_to_json(options)}
        return decode_table_info(self._orders.change("create_table", encode_json(body)))

    def drop_table(self, table: TableInfo) -> int:
        return int(as_object(self._orders.change("drop_table", encode_json({"name": table.name})))["index"])

    def change(self, changes: Sequence[TableChange]) -> Future[int]:
        self._check_open()
        body = payload.encode_transaction([payload.operation_of(change) for change in changes])
        answer: Future[int] = Future()
        answer.set_running_or_notify_cancel()
        try:
            answer.set_result(int(as_object(self._orders.change("transaction", body.to_pybytes()))["index"]))
        except MarbleError as error:
            answer.set_exception(error)
        return answer

    def tables(self) -> Sequence[TableInfo]:
        return decode_tables(self._call(lambda endpoint, left: self._action(endpoint, "tables", b"", left)))

    def checkpoint(self, path: str | os.PathLike[str]) -> int:
        raise UsageError(
            "a checkpoint is made by the process that has the data: use marble.backup.backup for a cluster"
        )

    def find(self, name: str) -> TableInfo | None:
        return next((info for info in self.tables() if info.name == name), None)

    def status(self) -> dict[str, Any]:
        return as_object(
            self._call(lambda endpoint, left: self._action(endpoint, "status", b"", left), self._contacts.given)
        )

    def ask(self, name: str, body: bytes) -> dict[str, Any]:
        """The answer of any node to an action that changes nothing."""
        return as_object(self._call(lambda endpoint, left: self._action(endpoint, name, body, left)))

    def ask_one(self, endpoint: str, name: str, body: bytes) -> dict[str, Any]:
        """The answer of the node at `endpoint`, however long it takes within this client's deadline."""
        return as_object(self._action(endpoint, name, body, self._options.timeout_s))

    def ask_bytes(self, endpoint: str, name: str, body: bytes) -> bytes:
        """As `ask_one`, of an answer that is no JSON."""
        return self._action(endpoint, name, body, self._options.timeout_s)

    def order(self, name: str, body: bytes) -> dict[str, Any]:
        """The leader's answer to an action that changes something; see `Orders.once`."""
        self._check_open()
        return as_object(self._orders.once(name, body))

    # -- reads -------------------------------------------------------------------------------------------------------

    def get_many(
        self, table: TableInfo, keys: pa.RecordBatch, consistency: str, at_index: int | None
    ) -> pa.RecordBatch:
        path = (table.name, GET, consistency) if at_index is None else (table.name, GET, consistency, str(at_index))

        def read(endpoint: str, left: float) -> pa.RecordBatch:
            descriptor = fl.FlightDescriptor.for_path(*path)
            writer, reader = self._client(endpoint).do_exchange(descriptor, call_options(left))
            with writer, self._watched(reader, left, endpoint):
                writer.begin(keys.schema)
                writer.write_batch(keys)
                writer.done_writing()
                batch = reader.read_chunk().data
            if batch is None or batch.num_rows != keys.num_rows:
                raise ProtocolError(f"{endpoint} did not answer one row for each key")
            return batch

        return self._call(read, self._replicas(consistency))

    def scan(self, table: TableInfo, request: ScanRequest) -> pa.RecordBatchReader:
        # The filter runs here; the columns that it looks at must travel too, but only the rows that it leaves possible.
        wanted, keys = request.columns, KeyRange(request.lower or b"", request.upper)
        if request.filter is not None:
            chosen = table.schema.names if wanted is None else wanted
            wanted = tuple(columns_read(table.schema, chosen, request.filter))
            keys &= push_down(table, request.filter).keys
        asked = dataclasses.replace(request, columns=wanted, lower=keys.lower or None, upper=keys.upper)
        ticket = fl.Ticket(encode_ticket(table.name, asked))

        def begin(endpoint: str, left: float) -> fl.FlightStreamReader:
            # A call's deadline covers the whole of a scan, so it is generous, and the watch ends a scan that stands still. But
            # DoGet itself waits for the first answer, uninterruptibly: ask first whether there is somebody to give it.
            self._vigil.ping(endpoint, left)
            reader = self._client(endpoint).do_get(ticket, call_options(SCAN_TIMEOUT_S))
            with self._watched(reader, left, endpoint):
                reader.schema  # noqa: B018  (waits for the first answer: until then another node can be asked)
            return reader

        reader = self._call(begin, self._replicas(request.consistency))
        batches = self._batches(reader)
        if request.filter is None:
            return pa.RecordBatchReader.from_batches(reader.schema, batches)
        # What gRPC delivers begins anywhere in memory, and Arrow complains when it computes on that.
        aligned = (decode_payload(encode_payload(batch), batch.schema) for batch in batches)
        source = pa.RecordBatchReader.from_batches(reader.schema, aligned)
        kept = filter_batches(source, request.columns, request.filter)
        if request.limit is None:
            return kept
        return pa.RecordBatchReader.from_batches(kept.schema, first_rows(kept, request.limit, reader.cancel))

    def _replicas(self, consistency: str) -> tuple[str, ...] | None:
        """Whom to ask: about one replica's own state only those whom the user named."""
        return None if consistency == "linearizable" else self._contacts.given

    def _batches(self, reader: fl.FlightStreamReader) -> Iterator[pa.RecordBatch]:
        """The batches of a Flight stream; a break comes out as a MarbleError."""
        while True:
            try:
                with self._watched(reader, self._options.timeout_s):
                    batch = reader.read_chunk().data
            except StopIteration:
                return
            except STREAM_ERRORS as error:
                raise from_flight_error(error) from None
            yield batch

    # -- plumbing ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            puts = list(self._puts.values())
        deadline = time.monotonic() + self._options.timeout_s
        for put in puts:
            put.close(max(0.0, deadline - time.monotonic()))
        self._close_sessions([*(put.session for put in puts), self._orders.session])
        self._closed.set()
        self._vigil.join()
        self._clients.close()

    def _close_sessions(self, sessions: Sequence[int]) -> None:
        leader = self._contacts.leader
        if leader is None:
            return
        # The first that fails is the last: they all end by themselves, and nobody is to wait for them.
        with contextlib.suppress(MarbleError):
            for session in filter(None, sessions):
                self._action(leader, "close_session", encode_json({"session": session}), CLOSE_SESSION_TIMEOUT_S)

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            # gRPC's threads did not come along: any call would hang, whatever its deadline.
            raise UsageError("this connection was made before a fork: connect again in the child")
        if self._closed.is_set():
            raise UsageError("the connection is closed")

    def _open_puts(self) -> list[PutStream]:
        with self._lock:
            return list(self._puts.values())

    def _watched(
        self, reader: fl.FlightStreamReader, timeout_s: float, endpoint: str | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """See `Vigil.watched`."""
        with self._lock:
            self._check_open()
            self._vigil.start()
        return self._vigil.watched(reader, timeout_s, endpoint)

    def _refresh(self) -> None:
        """Ask the likely leader which nodes there are; not to know it now costs nothing."""
        with contextlib.suppress(MarbleError):
            self._learn(as_object(self._action(self._contacts.candidates()[0], "status", b"", REFRESH_TIMEOUT_S)))

    def _client(self, endpoint: str) -> fl.FlightClient:
        self._check_open()
        return self._clients.get(endpoint)

    def _action(self, endpoint: str, name: str, body: bytes, timeout_s: float) -> bytes:
        """One action at one node; what Flight raises comes out as a MarbleError."""
        return act(self._client(endpoint), name, body, timeout_s, peer=endpoint)

    def _call(self, attempt: Callable[[str, float], T], only: Sequence[str] | None = None) -> T:
        """Run `attempt`, which may be repeated, at one node after the other until one answers or the time is up.

        It gets an endpoint (of `only`, if given) and how many seconds it may take.
        """
        deadline = time.monotonic() + self._options.timeout_s
        backoff = Backoff(deadline, self._closed)
        while True:
            error: MarbleError = UnavailableError("no node answers")
            refused: dict[str, None] = {}
            contacts = self._contacts
            candidates = contacts.candidates() if only is None else contacts.willing_first(only)
            for number, endpoint in enumerate(candidates):
                self._check_open()
                # Its share of the time that is left: one that hangs must not use up the others'.
                left = (deadline - time.monotonic()) / (len(candidates) - number)
                try:
                    if not contacts.is_fresh(endpoint) and len(candidates) > 1:
                        self._vigil.ping(endpoint, max(RETRY_WAIT_MIN_S, min(left, contacts.patience_s(endpoint))))
                    answer = attempt(endpoint, max(RETRY_WAIT_MIN_S, min(left, ATTEMPT_TIMEOUT_S)))
                    contacts.helped(endpoint)
                    return answer
                except (MarbleError, *STREAM_ERRORS) as failure:
                    error = from_flight_error(failure, peer=endpoint)
                if isinstance(error, NotLeaderError):
                    contacts.leader = error.leader
                elif not isinstance(error, UnavailableError | OutcomeUnknownError):
                    raise error
                else:
                    contacts.refused(endpoint)
                    refused[str(error)] = None
            if refused and isinstance(error, UnavailableError):
                error = UnavailableError(f"{'; '.join(refused)}; see `marble doctor {','.join(candidates)}`")
            backoff.wait(error)


def connect(
    url: str,
    *,
    timeout_s: float = 30.0,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    tls_ca: str | os.PathLike[str] | None = None,
    tls_cert: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
) -> Database:
    """Connect to a cluster.

    Parameters
    ----------
    url, timeout_s
        ``grpc://host:port,…`` or, if its nodes encrypt, ``grpc+tls://…``; how many seconds a call may take.
    token, token_file
        The bearer token, or a file with it, which is read again when it changes. None: the file that MARBLE_TOKEN_FILE names.
    tls_ca, tls_cert, tls_key
        PEM files: who signs the nodes' certificates (None: MARBLE_CA, or else whom this machine trusts), and the client's own
        certificate and key, where the cluster wants one (None: MARBLE_CERT and MARBLE_KEY).

    Returns
    -------
    Database
        To be closed, or used with ``with``. Nothing is sent before the first call.

    Raises
    ------
    UsageError
        If `url` is not of that form, or a file is not what it should be.
    """
    options = ClientOptions(timeout_s, credentials_for(url, token, token_file, tls_ca, tls_cert, tls_key))
    return Database(RemoteBackend(parse_url(url), options))
