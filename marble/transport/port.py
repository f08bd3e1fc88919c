"""The Flight server itself, which knows nothing: each method of Flight is handed on to whoever owns the port.

Rule 1: nothing is decided here, and nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pyarrow.flight as fl

from marble.errors import MarbleError
from marble.transport import wire
from marble.transport.admission import Admission, AdmissionFactory, check_node
from marble.transport.carrier import RAFT_COMMAND, Arrival, FlightArrival
from marble.transport.faults import to_flight_error


class FlightService(Protocol):
    """What answers clients. Methods are those of `pyarrow.flight.FlightServerBase` and run on gRPC's threads.

    A `MarbleError` that one raises reaches the client as such (`marble.transport.faults`). `context` and the reader and
    writer are valid only until the method returns. Batches that a reader gives are not validated.
    """

    def list_flights(self, context: fl.ServerCallContext, criteria: bytes) -> Iterable[fl.FlightInfo]: ...
    def get_flight_info(self, context: fl.ServerCallContext, descriptor: fl.FlightDescriptor) -> fl.FlightInfo: ...
    def get_schema(self, context: fl.ServerCallContext, descriptor: fl.FlightDescriptor) -> fl.SchemaResult: ...
    def do_get(self, context: fl.ServerCallContext, ticket: fl.Ticket) -> fl.FlightDataStream: ...
    def do_put(
        self,
        context: fl.ServerCallContext,
        descriptor: fl.FlightDescriptor,
        reader: fl.MetadataRecordBatchReader,
        writer: fl.FlightMetadataWriter,
    ) -> None: ...
    def do_exchange(
        self,
        context: fl.ServerCallContext,
        descriptor: fl.FlightDescriptor,
        reader: fl.MetadataRecordBatchReader,
        writer: fl.MetadataRecordBatchWriter,
    ) -> None: ...
    def do_action(self, context: fl.ServerCallContext, action: fl.Action) -> Iterable[bytes | fl.Result]: ...
    def list_actions(self, context: fl.ServerCallContext) -> Iterable[fl.ActionType | tuple[str, str]]: ...


class PortOwner(Protocol):
    """Takes what comes in at a port; called on gRPC's threads."""

    def serve(self) -> AbstractContextManager[FlightService]:
        """Around a client's call: who answers it. Raises the Flight error that the client is told."""
        ...

    def take_messages(self, arrival: Arrival) -> None:
        """Take a stream of another node in, until it ends. Raises the Flight error that the caller is told."""
        ...


class Port(fl.FlightServerBase):  # type: ignore[misc]  # pyarrow has no type hints
    """Listens on `location` (a Flight URI) from construction on, for `owner`.

    Parameters
    ----------
    admission
        Looks at every call before its handler.
    options
        More arguments of `pyarrow.flight.FlightServerBase`: certificates.
    """

    def __init__(
        self, location: str, owner: PortOwner, admission: AdmissionFactory, options: Mapping[str, Any]
    ) -> None:
        self._owner = owner
        middleware = {Admission.KEY: admission, wire.CallHeaders.KEY: wire.CallHeadersFactory()}
        super().__init__(location, middleware=middleware, **options)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        if descriptor.command == RAFT_COMMAND:
            try:
                check_node(context)
            except MarbleError as error:
                raise to_flight_error(error) from None
            self._owner.take_messages(FlightArrival(reader, writer))
            return
        with self._owner.serve() as service:
            service.do_exchange(context, descriptor, reader, writer)

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[fl.FlightInfo]:
        with self._owner.serve() as service:
            yield from service.list_flights(context, criteria)

    def get_flight_info(self, context: Any, descriptor: Any) -> fl.FlightInfo:
        with self._owner.serve() as service:
            return service.get_flight_info(context, descriptor)

    def get_schema(self, context: Any, descriptor: Any) -> fl.SchemaResult:
        try:
            with self._owner.serve() as service:
                return service.get_schema(context, descriptor)
        except fl.FlightError as error:
            # From this one method pyarrow passes no Flight error on: the client gets an ArrowInvalid with the message.
            raise ValueError(str(error)) from None

    def do_get(self, context: Any, ticket: Any) -> fl.FlightDataStream:
        with self._owner.serve() as service:
            return service.do_get(context, ticket)

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        with self._owner.serve() as service:
            service.do_put(context, descriptor, reader, writer)

    def do_action(self, context: Any, action: Any) -> Iterator[Any]:
        with self._owner.serve() as service:
            yield from service.do_action(context, action)

    def list_actions(self, context: Any) -> list[Any]:
        with self._owner.serve() as service:
            return list(service.list_actions(context))
