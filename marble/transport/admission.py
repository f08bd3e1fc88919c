"""At the port's door: who makes a call, before a byte of its body is looked at.

Rule 1: a call without a name that the files know is refused in `start_call`, on its headers alone. What is left open there is only
who the holder of a certificate is, which gRPC has checked by then and tells no sooner than the handler runs.
Rule 2: whatever is missing refuses. A call that nobody has let in may do nothing.
Rule 3: refusals are counted, told to the caller in words, and logged seldom, without what was brought.

A call has one of these names:

- a token's holder: what the file says. It counts before everything else, so that a node that relays a client's call with the
  client's token gets the client's rights and no more;
- a node: it proved by the header `PEER_HEADER` that it knows the cluster's secret, or its certificate has a name of ``peer_names``,
  or, where neither is configured, any certificate of the CA. It may open streams of messages, nothing else by that;
- a certificate's holder: what the file of tokens says of that name;
- anyone, with all rights, where no tokens are configured.
"""

from __future__ import annotations

import datetime
import fnmatch
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pyarrow.flight as fl

from marble.env import Clock
from marble.errors import ForbiddenError, MarbleError, UnauthenticatedError
from marble.metrics import Metrics
from marble.transport.faults import to_flight_error
from marble.transport.proof import PEER_HEADER
from marble.transport.security import BEARER, TOKEN_HEADER, Security
from marble.transport.tokens import ANYONE, Access, Principal

REFUSALS_LOGGED_EVERY_S: Final = 10.0
"""A stranger who tries again and again writes one line in this time."""

_log = logging.getLogger("marble.server")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Door:
    """Who comes in at one node's port. Thread-safe.

    Parameters
    ----------
    security
        Gives what counts now; asked for every call.
    cluster_id, node_id
        Of this node.
    metrics
        Counts ``transport_unauthenticated`` and ``transport_forbidden``.
    """

    def __init__(
        self, security: Callable[[], Security], cluster_id: str, node_id: int, metrics: Metrics, clock: Clock
    ) -> None:
        self._security = security
        self._cluster_id = cluster_id
        self._node_id = node_id
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_s: dict[str, float] = {}
        self._unauthenticated = metrics.counter("transport_unauthenticated")
        self._forbidden = metrics.counter("transport_forbidden")

    def knock(self, headers: Mapping[str, Sequence[str]]) -> Admission:
        """Look at the headers of a call. Raises UnauthenticatedError if they cannot belong to anybody who may come in."""
        security = self._security()
        tokens = _named(headers, TOKEN_HEADER)
        proofs = _named(headers, PEER_HEADER)
        if tokens and security.tokens is not None:
            return Admission(self, security, self._holder(security, tokens), False, tokens[0])
        if proofs and security.secret is not None:
            node = security.secret.check_call(self._cluster_id, proofs[0]) if len(proofs) == 1 else None
            if node is None:
                raise self._refuse("the proof of the cluster's secret is wrong: give all nodes the same secret_file")
            return Admission(self, security, None, True)
        by_certificate = security.tls is not None and security.tls.client_certificates
        if security.tokens is not None and not by_certificate:
            raise self._refuse("this node wants a token: connect(..., token=...), --token-file or MARBLE_TOKEN_FILE")
        return Admission(self, security, None if security.tokens is not None else ANYONE, False)

    def _holder(self, security: Security, tokens: Sequence[str]) -> Principal:
        assert security.tokens is not None
        if len(tokens) != 1 or not tokens[0].startswith(BEARER):
            raise self._refuse("the header authorization must stand once and hold 'Bearer' and a token")
        holder = security.tokens.find(tokens[0][len(BEARER) :].strip(), _now())
        if holder is None:
            raise self._refuse("the token is wrong, has expired or was taken back: ask the operator for a new one")
        return holder

    def _refuse(self, why: str) -> UnauthenticatedError:
        self._unauthenticated.add()
        self._note("unauthenticated", f"({self._unauthenticated.value} so far): {why}")
        return UnauthenticatedError(f"node {self._node_id} does not know you: {why}")

    def forbid(self, error: ForbiddenError) -> None:
        """Count and log a call that was refused for what it wanted."""
        self._forbidden.add()
        self._note("forbidden", f"({self._forbidden.value} so far): {error}")

    def _note(self, kind: str, text: str) -> None:
        now = self._clock.monotonic()
        with self._lock:
            last = self._logged_s.get(kind)
            if last is not None and now - last < REFUSALS_LOGGED_EVERY_S:
                return
            self._logged_s[kind] = now
        _log.warning("node %d refused a call, %s %s", self._node_id, kind, text)

    def by_certificate(self, security: Security, name: str) -> Principal:
        """The holder of the certificate called `name`. Raises UnauthenticatedError if the file does not know it."""
        assert security.tokens is not None
        holder = security.tokens.find_certificate(name, _now()) if name else None
        if holder is None:
            raise self._refuse(f"it wants a token, or a certificate that its file of tokens knows, not {name[:255]!r}")
        return holder

    def check_node(self, security: Security, proved: bool, name: str) -> None:
        """Raise UnauthenticatedError unless who calls is a node: it `proved` so, or its certificate called `name` says so."""
        if security.secret is not None and not proved:
            raise self._refuse("a node must prove that it knows the cluster's secret, and this caller did not")
        tls = security.tls
        if (
            tls is not None
            and tls.peer_names
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in tls.peer_names)
        ):
            raise self._refuse(f"{name[:255]!r}, the name in the caller's certificate, is none of peer_names")


class Admission(fl.ServerMiddleware):  # type: ignore[misc]  # pyarrow has no type hints
    """Who makes one call, as far as its headers say. A handler finds it in its context under `KEY`."""

    KEY: Final = "marble-admission"

    def __init__(
        self, door: Door, security: Security, principal: Principal | None, proved: bool, bearer: str | None = None
    ) -> None:
        self._bearer = bearer
        self._door = door
        self._security = security
        self._principal = principal
        self._proved = proved

    def principal(self, context: fl.ServerCallContext) -> Principal:
        """The client that calls. Raises UnauthenticatedError for a node that only said that it is one, and for strangers."""
        if self._principal is None:
            if self._security.tokens is None:
                self._principal = ANYONE
            else:
                self._principal = self._door.by_certificate(self._security, _name_of(context))
        return self._principal

    @property
    def authority(self) -> list[tuple[bytes, bytes]]:
        """Headers under which a call that is relayed for this one has its rights, and no others."""
        return [] if self._bearer is None else [(TOKEN_HEADER.encode(), self._bearer.encode())]

    def demand(self, context: fl.ServerCallContext, access: Access, table: str | None) -> None:
        """Raise ForbiddenError unless the client may."""
        try:
            self.principal(context).demand(access, table)
        except ForbiddenError as error:
            self._door.forbid(error)
            raise

    def check_node(self, context: fl.ServerCallContext) -> None:
        """Raise UnauthenticatedError unless a node calls."""
        self._door.check_node(self._security, self._proved, _name_of(context))


class AdmissionFactory(fl.ServerMiddlewareFactory):  # type: ignore[misc]
    """Asks `door` about every call that a server takes."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str]]) -> Admission:
        try:
            return self._door.knock(headers)
        except MarbleError as error:
            raise to_flight_error(error) from None


def demand(context: fl.ServerCallContext, access: Access, table: str | None) -> None:
    """Raise ForbiddenError unless who makes the call `context` may do `access` to `table`; see `Principal.may`."""
    admission: Admission | None = context.get_middleware(Admission.KEY)
    if admission is not None:
        admission.demand(context, access, table)


def may(context: fl.ServerCallContext, access: Access, table: str | None) -> bool:
    """Whether who makes the call may do `access` to `table`; to choose what to show, so it is neither counted nor logged."""
    admission: Admission | None = context.get_middleware(Admission.KEY)
    return admission is None or admission.principal(context).may(access, table)


def authority(context: fl.ServerCallContext) -> list[tuple[bytes, bytes]]:
    """Headers for what a node sends to the leader on behalf of the call `context`: its token goes along, the leader judges it again."""
    admission: Admission | None = context.get_middleware(Admission.KEY)
    return [] if admission is None else admission.authority


def check_node(context: fl.ServerCallContext) -> None:
    """Raise UnauthenticatedError unless the call `context` is another node's."""
    admission: Admission | None = context.get_middleware(Admission.KEY)
    if admission is not None:
        admission.check_node(context)


def _name_of(context: fl.ServerCallContext) -> str:
    """The first alternative name, or else the common name, of the caller's certificate; "" if it showed none."""
    identity = context.peer_identity()
    return identity.decode("utf-8", "replace") if isinstance(identity, bytes) else str(identity or "")


def _named(headers: Mapping[str, Sequence[str]], wanted: str) -> list[str]:
    return [
        value if isinstance(value, str) else value.decode("utf-8", "replace")
        for name, values in headers.items()
        if name.lower() == wanted
        for value in values
    ]
