"""The tables of a node for any Arrow Flight client, on the port that peers use too.

Rule 1: everything from a client is untrusted: names, sizes, JSON and batches are checked here, before the log sees
them, and whatever is wrong is one error to that client and nothing else.
Rule 2: no handler waits without end, so that the server can stop: every wait ends with `TablesService.stop`, with the
call, or with a deadline.

The verbs (see `marble.transport.wire` for the JSON in them):

- DoPut ``[table]`` or ``[table, "upsert"]``, and ``[table, "delete"]`` (key columns only): each batch is one entry of
  the log and gets one ack, in order. A batch that is wrong gets an error for its ack, and the stream goes on; after a
  batch that was refused ("unavailable", "not_leader") all that follows in the stream is, too: open another.
- DoGet: a ticket, or the name of a table.
- DoExchange ``[table, "get"]``, ``[table, "get", "local"]`` or ``[table, "get", consistency, index]``, the last for a past
  state: for each batch of keys one batch of rows; with "upsert" or "delete" like DoPut, the acks as metadata without rows.
  With a stamp (`marble.transport.wire.Stamp`) as its ``app_metadata`` a batch takes effect once, however often it comes.
- ListFlights, GetFlightInfo and GetSchema of ``[table]``; ListActions; DoAction of `marble.actions.ACTIONS`.

What changes something is relayed to the leader if this node does not lead, unless the call has the header
``marble-forward: never``. Reads are answered by every node.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.flight as flight

from marble.actions import ACTIONS, Actions, may_forward
from marble.config import addresses_of, parse_endpoint
from marble.database import check_scan
from marble.engine import NodeStoppedError
from marble.errors import (
    MarbleError,
    UnavailableError,
    UsageError,
)
from marble.local import ANSWER_MARGIN_S, LocalBackend, scan_view, then
from marble.lsm.view import TableView
from marble.promises import Committed, Lane
from marble.rows import conform_keys
from marble.schema import TableInfo, check_table_name
from marble.stopwatch import Calls
from marble.transport import wire
from marble.transport.admission import authority, demand, may
from marble.transport.faults import to_flight_error
from marble.transport.intake import Intake, StreamEndedError, Ways
from marble.transport.relay import Relays
from marble.transport.security import PLAIN, Credentials
from marble.transport.tickets import decode_ticket, encode_ticket
from marble.transport.tokens import ANYWHERE, Access
from marble.web.watch import Watch

logger = logging.getLogger("marble.server")

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
_Method = TypeVar("_Method", bound=Callable[..., Any])

STREAMS_MAX: Final = 256
"""Streams open at a time. Each may hold a thread and a window of batches, also if its client has fallen silent."""

READ_BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
"""What one message of a scan holds at most, unless a single row is larger. A client that reads slowly keeps about so much in memory."""

KEYS_MAX: Final = 1024 * 1024
"""Keys in one batch of a lookup; its rows are gathered at once."""


def _answering(method: _Method) -> _Method:
    """Let what `method` raises reach the client as an error of Flight that names its kind."""

    @functools.wraps(method)
    def answer(self: TablesService, *arguments: Any) -> Any:
        begun, outcome = time.monotonic(), "ok"
        try:
            self.check_running()
            return method(self, *arguments)
        except (MarbleError, pa.ArrowException, flight.FlightError) as error:
            outcome = type(error).__name__
            raise to_flight_error(_abroad(error)) from None
        except OSError as error:
            # So says Arrow of a stream whose client has gone.
            outcome = "gone"
            raise flight.FlightUnavailableError(f"the stream broke: {error}") from None
        except Exception as error:
            outcome = "failed"
            logger.exception("%s failed", method.__name__)
            raise to_flight_error(error) from error
        finally:
            self._calls.ended(_called(method.__name__, arguments), outcome, time.monotonic() - begun)

    return answer  # type: ignore[return-value]


def _called(method: str, arguments: Sequence[Any]) -> str:
    """What was called, in one of few words: what clients invent counts as one."""
    if method != "do_action":
        return method
    kind = arguments[1].type
    return f"do_action/{kind if kind in ACTIONS else 'unknown'}"


class TablesService:
    """Answers Flight clients out of a node in this process: a `marble.transport.port.FlightService`. Thread-safe.

    Parameters
    ----------
    backend
        The node and its tables.
    watch
        Knows how the node is.
    """

    def __init__(
        self, backend: LocalBackend, watch: Watch, credentials: Callable[[], Credentials] = lambda: PLAIN
    ) -> None:
        self._backend = backend
        self._credentials = credentials
        self._node = backend.node
        self._machine = backend.machine
        self._timeout_s = backend.node.options.propose_timeout_s
        self._calls = Calls(backend.node.metrics)
        self._relays = Relays(self._find_leader, self._timeout_s, credentials)
        self._stopped: Future[None] = Future()
        self._lock = threading.Lock()
        self._intakes: set[Intake] = set()
        self._streams = threading.BoundedSemaphore(STREAMS_MAX)
        self._actions = Actions(backend, self._relays, self._result, self._confirm, watch)

    def stop(self) -> None:
        """End all waits and streams: what is under way is answered with OutcomeUnknownError. Idempotent."""
        with self._lock:
            if self._stopped.done():
                return
            self._stopped.set_result(None)
            intakes = list(self._intakes)
        for intake in intakes:
            intake.stop()
        self._relays.stop()

    def unreachable(self, peer: int) -> None:
        """A stream to node `peer` broke. Returns at once."""
        endpoint = self._node.endpoints.get(peer)
        if endpoint is not None:
            self._relays.renew(endpoint)

    def check_running(self) -> None:
        """Raise UnavailableError after `stop`."""
        if self._stopped.done():
            raise UnavailableError(f"node {self._node.options.node_id} stops: ask another one")

    # -- streams -----------------------------------------------------------------------------------------------------

    @_answering
    def do_put(self, context: Any, descriptor: flight.FlightDescriptor, reader: Any, writer: Any) -> None:
        """Take a stream of batches; see the module's head."""
        name, verb, _ = _path(descriptor, (wire.UPSERT, wire.DELETE))
        demand(context, Access.WRITE, name)
        self._take_writes(context, (name, verb or wire.UPSERT), reader, writer.write)

    @_answering
    def do_exchange(self, context: Any, descriptor: flight.FlightDescriptor, reader: Any, writer: Any) -> None:
        """Look up keys, or take a stream of batches; see the module's head."""
        name, verb, rest = _path(descriptor, (wire.GET, wire.UPSERT, wire.DELETE))
        if not verb:
            raise UsageError(f'DoExchange needs a path of table and verb: [{name!r}, "get"], "upsert" or "delete"')
        demand(context, Access.READ if verb == wire.GET else Access.WRITE, name)
        if verb == wire.GET:
            with self._stream():
                self._look_up(name, *_moment(rest), reader, writer)
        else:
            self._take_writes(
                context, (name, verb), reader, lambda acks: writer.write_metadata(pa.py_buffer(acks)), wire.ACKS_MAX
            )

    @_answering
    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.GeneratorStream:
        """Stream the rows of a table in key order."""
        asked = decode_ticket(ticket.ticket)
        demand(context, Access.READ, asked.table)
        view = self._view(asked.table, asked.request.consistency, asked.request.at_index)
        check_scan(view.info, asked.request.columns, None)
        reader = scan_view(view, asked.request, READ_BATCH_BYTES_MAX)
        return flight.GeneratorStream(reader.schema, self._rows(reader))

    def _take_writes(
        self, context: Any, path: tuple[str, str], reader: Any, answer: Callable[[bytes], None], acks_max: int = 1
    ) -> None:
        name, verb = path
        wire.check_texts(reader.schema)
        write = self._backend.write_entry if verb == wire.UPSERT else self._backend.delete_entry

        rights = authority(context)
        term, lane = 0, Lane()

        def offer(batch: pa.RecordBatch, stamp: wire.Stamp | None, begins: bool) -> Future[wire.Ack]:
            nonlocal term, lane
            if begins:
                # All that is under way at once belongs to one leadership, so that none of it can pass what was refused.
                term, lane = self._node.leading_term, Lane()
            if not term:
                raise self._actions.not_leader()
            try:
                return then(write(self._table(name), batch, term, stamp, lane), _ack, _abroad)
            except NodeStoppedError as error:
                raise _abroad(error) from None

        ways = Ways(
            offer=offer,
            leads=lambda: self._node.leading_term != 0,
            open_relay=(lambda: self._relays.open_stream(path, reader.schema, rights))
            if may_forward(context)
            else None,
            timeout_s=self._timeout_s + ANSWER_MARGIN_S,
        )
        with self._stream(), Intake(name, ways, answer, acks_max) as intake, self._listed(intake):
            for chunk in _chunks(reader):
                try:
                    if chunk.data is None:
                        raise UsageError(f"table {name!r}: there is a message without rows in the stream")
                    stamp = None if chunk.app_metadata is None else wire.decode_stamp(chunk.app_metadata)
                except UsageError as error:
                    intake.refuse(error)
                else:
                    intake.take(chunk.data, stamp)
        self.check_running()

    @contextlib.contextmanager
    def _listed(self, intake: Intake) -> Iterator[None]:
        """Let `stop` find `intake`."""
        with self._lock:
            if self._stopped.done():
                raise StreamEndedError
            self._intakes.add(intake)
        try:
            yield
        finally:
            with self._lock:
                self._intakes.discard(intake)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """Count a stream while it is open."""
        if not self._streams.acquire(blocking=False):
            raise UnavailableError(f"this node has {STREAMS_MAX} streams open: close some, or retry later")
        try:
            yield
        finally:
            self._streams.release()

    def _look_up(self, name: str, consistency: str, at_index: int | None, reader: Any, writer: Any) -> None:
        schema: pa.Schema | None = None
        wire.check_texts(reader.schema)
        for chunk in _chunks(reader):
            self.check_running()
            keys = chunk.data
            if keys is None or keys.num_rows > KEYS_MAX:
                raise UsageError(f"table {name!r}: look up 1 to {KEYS_MAX} keys with each batch")
            view = self._view(name, consistency, at_index)
            rows = view.get_many(conform_keys(keys, view.info))
            if schema is None:
                writer.begin(rows.schema)
                schema = rows.schema
            elif not schema.equals(rows.schema):
                raise UnavailableError(f"table {name!r} was dropped and created anew meanwhile: open another stream")
            writer.write_batch(rows)

    def _rows(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        """The batches of a scan in messages of bounded size."""
        try:
            with self._stream():
                for batch in reader:
                    rows = max(1, batch.num_rows * READ_BATCH_BYTES_MAX // max(1, batch.nbytes))
                    for first in range(0, batch.num_rows, rows):
                        self.check_running()
                        yield batch.slice(first, rows)
        except MarbleError as error:
            raise to_flight_error(_abroad(error)) from None

    # -- tables ------------------------------------------------------------------------------------------------------

    @_answering
    def list_flights(self, context: Any, criteria: bytes) -> Iterator[flight.FlightInfo]:
        """One flight for each table."""
        if criteria:
            raise UsageError("ListFlights takes no criteria: it lists all tables")
        demand(context, Access.READ, ANYWHERE)
        self._confirm()
        tables = [table for table in self._machine.tables() if may(context, Access.READ, table.name)]
        return iter([self._info(self._machine.read(table.id)) for table in tables])

    @_answering
    def get_flight_info(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        """Schema, rows and ticket of a table."""
        name, _, _ = _path(descriptor, ())
        demand(context, Access.READ, name)
        return self._info(self._view(name, "linearizable"))

    @_answering
    def get_schema(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.SchemaResult:
        """Schema of a table."""
        name, _, _ = _path(descriptor, ())
        demand(context, Access.READ, name)
        return flight.SchemaResult(self._view(name, "linearizable").info.schema)

    def _info(self, view: TableView) -> flight.FlightInfo:
        known = self._node.endpoints
        mine = known.get(self._node.options.node_id)
        # Every node can answer; this one is named first, as the client has found it already.
        nodes = sorted(known.values(), key=lambda endpoint: endpoint != mine)
        addresses = [address for endpoint in nodes for address in addresses_of(endpoint)]
        make = flight.Location.for_grpc_tls if self._credentials().tls else flight.Location.for_grpc_tcp
        locations = [make(*parse_endpoint(address)) for address in addresses]
        endpoint = flight.FlightEndpoint(encode_ticket(view.info.name), locations)
        descriptor = flight.FlightDescriptor.for_path(view.info.name)
        return flight.FlightInfo(view.info.schema, descriptor, [endpoint], view.row_count, -1)

    def _view(self, name: str, consistency: str, at_index: int | None = None) -> TableView:
        check_table_name(name)
        if consistency == "linearizable" and (at_index is None or at_index > self._machine.applied_index):
            self._confirm()
        return self._machine.read(name, at_index)

    def _table(self, name: str) -> TableInfo:
        """The table `name`; asks the cluster before it says that there is none."""
        try:
            return self._machine.table(name)
        except UsageError:
            self._confirm()
            return self._machine.table(name)

    def _confirm(self) -> None:
        """Wait until what this node has applied is at least what was committed anywhere when the call came."""
        self._result(
            self._node.read_index(lease=self._backend.lease_reads), self._node.options.read_timeout_s, UnavailableError
        )

    # -- actions -----------------------------------------------------------------------------------------------------

    @_answering
    def list_actions(self, context: Any) -> Sequence[tuple[str, str]]:
        """What DoAction can do."""
        demand(context, Access.READ, ANYWHERE)
        return list(ACTIONS.items())

    @_answering
    def do_action(self, context: Any, action: flight.Action) -> Iterator[bytes]:
        """Do one of `marble.actions.ACTIONS`; one result."""
        return iter([self._actions.do(context, action)])

    # -- waiting -----------------------------------------------------------------------------------------------------

    def _result(self, future: Future[T], timeout_s: float, late: type[MarbleError]) -> T:
        """The result of `future`. If the engine is silent or the server stops, raises `late`."""
        either: list[Future[Any]] = [future, self._stopped]
        wait(either, timeout_s + ANSWER_MARGIN_S, FIRST_COMPLETED)
        if future.done():
            return future.result()
        why = "the node stops" if self._stopped.done() else "the engine does not answer (a slow disk?)"
        raise late(f"{why}: the call has no answer")

    def _find_leader(self, timeout_s: float) -> str | None:
        with contextlib.suppress(UnavailableError):
            self._node.wait_for_leader(timeout_s)
        return self._node.leader_endpoint


def _path(descriptor: flight.FlightDescriptor, verbs: Sequence[str]) -> tuple[str, str, list[str]]:
    """Table, verb ("" if there is none) and what follows a "get" in the path of `descriptor`."""
    known = ", ".join(f'"{verb}"' for verb in verbs)
    wanted = "a path [table]" + (f" or [table, verb] with a verb of {known}" if verbs else "")
    if descriptor.descriptor_type is not flight.DescriptorType.PATH or not descriptor.path:
        raise UsageError(f"the descriptor must be {wanted}")
    # Bytes that are not UTF-8 fail the check of the name, and are shown escaped.
    name, *rest = [part.decode("utf-8", "backslashreplace") for part in descriptor.path]
    check_table_name(name)
    verb = rest[0] if rest else ""
    if len(rest) > (3 if verb == wire.GET else 1) or (rest and verb not in verbs):
        raise UsageError(f"the descriptor must be {wanted}, not {str([name, *rest])[:200]}")
    return name, verb, rest[1:]


def _moment(rest: Sequence[str]) -> tuple[str, int | None]:
    """Consistency and index out of what follows a "get"."""
    consistency = wire.check_consistency(rest[0]) if rest else "linearizable"
    if len(rest) < 2:
        return consistency, None
    if len(rest[1]) > 20 or not (rest[1].isascii() and rest[1].isdigit()):
        raise UsageError(f"the index of a read must be a whole number, not {rest[1][:80]!r}")
    return consistency, wire.check_whole(int(rest[1]), "the index of a read")


def _chunks(reader: Any) -> Iterator[Any]:
    """The messages that a client sends."""
    while True:
        try:
            yield reader.read_chunk()
        except StopIteration:
            return


def _abroad(error: E) -> E | UnavailableError:
    """What a client is told of `error`: that a node stopped by itself is nothing to give up for while there are others."""
    return UnavailableError(f"{error}: ask another node") if isinstance(error, NodeStoppedError) else error


def _ack(committed: Committed) -> wire.Ack:
    return wire.Ack(committed.index, committed.term, committed.value)
