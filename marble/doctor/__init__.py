"""What keeps a client from a cluster, or the cluster from working, in plain words: ``marble doctor``.

An examination goes up in layers, and stops at a place where a layer fails: the name, the connection, what is spoken there, TLS, the
Flight call, who answers. Then it compares what the nodes say. It only ever reads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.flight as fl

from marble.config import format_endpoint, parse_endpoint
from marble.doctor.cluster import Visit, check_cluster, check_identity, check_node
from marble.doctor.findings import Finding, Level, Notes, Report
from marble.doctor.reach import Address, Speech, connect, find_addresses, hear_speech
from marble.doctor.tls import Papers, check_tls, speaks_tls
from marble.errors import MarbleError, ProtocolError, UsageError
from marble.orders import as_object
from marble.transport.faults import from_flight_error

__all__ = ["Finding", "Level", "Papers", "Report", "examine"]

ENDPOINTS_MAX: Final = 64
"""More are not visited, whatever the nodes say of each other."""

_ERRORS: Final = (fl.FlightError, pa.ArrowException, OSError)


def examine(
    endpoints: Sequence[str],
    papers: Papers | None = None,
    *,
    tls: bool | None = None,
    cluster_id: str | None = None,
    others: bool = True,
    timeout_s: float = 3.0,
) -> Report:
    """Examine the nodes at `endpoints`.

    Parameters
    ----------
    endpoints
        ``host:port`` of each.
    papers
        With TLS: what to trust and to show; with tokens: which.
    tls
        Whether the nodes are expected to speak TLS; None: either is right.
    cluster_id
        What their cluster should be called, if it is known.
    others
        Whether the nodes that they name are visited, too.
    timeout_s
        How long each single check may take, in seconds.

    Raises
    ------
    UsageError
        If an endpoint or a file of `papers` is not what it should be.
    """
    papers = papers or Papers()
    if papers.ca is not None or papers.certificate is not None:
        tls = True
    waiting: dict[str, int | None] = {format_endpoint(*parse_endpoint(each)): None for each in endpoints}
    if not waiting:
        raise UsageError("which node? give host:port")
    findings: list[Finding] = []
    visits: dict[str, Visit] = {}
    seen: set[int] = set()
    while waiting:
        endpoint = next(iter(waiting))
        expected = waiting.pop(endpoint)
        if expected in seen:
            continue  # It was visited under another of its names.
        notes = Notes(endpoint)
        visit = visits[endpoint] = _visit(notes, endpoint, papers, tls, timeout_s)
        if visit.status is not None:
            check_identity(notes, visit, cluster_id, expected)
            check_node(notes, visit)
            node = visit.status.get("node_id")
            if isinstance(node, int):
                seen.add(node)
            if others and cluster_id in (None, visit.status.get("cluster_id")):
                _remember(waiting, visits, visit.status)
        findings += notes.findings
    return Report((*findings, *check_cluster(list(visits.values()))))


def _remember(waiting: dict[str, int | None], visits: dict[str, Visit], status: Any) -> None:
    """Add the nodes that `status` names to those that are to be visited."""
    nodes = status.get("nodes")
    for node, endpoint in nodes.items() if isinstance(nodes, dict) else ():
        if len(waiting) + len(visits) >= ENDPOINTS_MAX:
            return
        # A stranger's words: what is no endpoint is left alone.
        with contextlib.suppress(UsageError, ValueError):
            place = format_endpoint(*parse_endpoint(endpoint))
            if place not in visits:
                waiting[place] = int(node)


def _visit(notes: Notes, endpoint: str, papers: Papers, tls: bool | None, timeout_s: float) -> Visit:
    """Go up the layers at `endpoint` as far as they carry."""
    host, port = parse_endpoint(endpoint)
    addresses = connect(notes, find_addresses(notes, host, port, timeout_s), timeout_s)
    if not addresses:
        return Visit(endpoint)
    encrypted = _find_speech(notes, addresses[0], timeout_s)
    if encrypted is None:
        return Visit(endpoint)
    if tls is not None and encrypted is not tls:
        _explain_mismatch(notes, encrypted)
        return Visit(endpoint)
    if encrypted and not check_tls(notes, addresses[0], host, papers, timeout_s):
        return Visit(endpoint)
    return _ask_status(notes, endpoint, encrypted, papers, timeout_s)


def _find_speech(notes: Notes, address: Address, timeout_s: float) -> bool | None:
    """Whether the port speaks TLS; None, with the reason noted, if it is no node's."""
    before = len(notes.findings)
    speech = hear_speech(notes, address, timeout_s)
    if len(notes.findings) > before:
        return None
    if speech is Speech.PLAIN:
        return False
    if speech is Speech.TLS or speaks_tls(address, timeout_s):
        return True
    if speech is None:
        notes.problem(
            "speech",
            f"it accepts the connection and then says nothing for {timeout_s:g} s: the process hangs or is stopped, or a firewall or "
            "proxy accepts in its place",
            "look at the process on that machine (state T or D in `ps`), its disk, and at proxies on the way",
        )
    else:
        notes.problem(
            "speech",
            "it closes the connection without a word of HTTP/2 or TLS: another program, or a proxy without a node behind it",
            "check the port; `ss -ltnp` on that machine says which program has it",
        )
    return None


def _explain_mismatch(notes: Notes, encrypted: bool) -> None:
    if encrypted:
        notes.problem(
            "tls", "the node speaks TLS, and you ask without", "use grpc+tls://host:port, with the cluster's CA (--ca)"
        )
    else:
        notes.problem(
            "tls",
            "the node speaks without TLS: what is sent could be read and changed on the way",
            "turn TLS on at the node ([node.tls]), or ask without it: grpc://host:port, and no --ca or --cert",
        )


def _ask_status(notes: Notes, endpoint: str, encrypted: bool, papers: Papers, timeout_s: float) -> Visit:
    """Ask for the status over Flight, as any client does."""
    headers = []
    if (token := papers.token()) is not None:
        headers.append((b"authorization", b"Bearer " + token.encode()))
    options = fl.FlightCallOptions(timeout=timeout_s, headers=headers)
    asked_us = _wall_us()
    try:
        with _client(endpoint, encrypted, papers) as client:
            status = _act(client, "status", options)
            answered_us = _wall_us()
            health = _ask_health(client, options)
        if not isinstance(status.get("cluster_id"), str) or not isinstance(status.get("node_id"), int):
            raise ProtocolError("its answer names no cluster")
    except (MarbleError, *_ERRORS) as error:
        _explain(notes, error, papers, timeout_s)
        return Visit(endpoint)
    return Visit(endpoint, status, asked_us, answered_us, health)


def _act(client: fl.FlightClient, name: str, options: fl.FlightCallOptions) -> dict[str, Any]:
    answers = list(client.do_action(fl.Action(name, b""), options))
    if len(answers) != 1:
        raise ProtocolError(f"it answers {len(answers)} times")
    return as_object(bytes(answers[0].body.to_pybytes()))


def _ask_health(client: fl.FlightClient, options: fl.FlightCallOptions) -> dict[str, Any] | None:
    """What the node says of its components; None from a version that does not, or from one that has gone meanwhile."""
    try:
        return _act(client, "health", options)
    except (MarbleError, *_ERRORS):
        return None


def _client(endpoint: str, encrypted: bool, papers: Papers) -> fl.FlightClient:
    if not encrypted:
        return fl.FlightClient(f"grpc://{endpoint}")
    files = {"tls_root_certs": papers.ca, "cert_chain": papers.certificate, "private_key": papers.key}
    known: dict[str, Any] = {name: path.read_bytes() for name, path in files.items() if path is not None}
    if papers.server_name is not None:
        known["override_hostname"] = papers.server_name
    return fl.FlightClient(f"grpc+tls://{endpoint}", **known)


def _explain(notes: Notes, error: Exception, papers: Papers, timeout_s: float) -> None:
    if isinstance(error, fl.FlightUnauthenticatedError):
        if papers.token_file is None:
            words, advice = "the node wants a token of its clients", "give the file of one with --token-file"
        else:
            words = f"the node does not know the token in {papers.token_file}"
            advice = "compare it with the node's token file: it may have been changed in rotation"
        notes.problem("token", words, advice)
    elif isinstance(error, fl.FlightUnauthorizedError):
        notes.problem("token", "the token may not read the status", "use one with the role read, write or admin")
    elif isinstance(error, fl.FlightTimedOutError):
        notes.problem(
            "call",
            f"the port speaks HTTP/2, but the call has no answer within {timeout_s:g} s: the engine of the node hangs, most likely on "
            "its disk",
            "look at the node's log, at `iostat` and `dmesg` on that machine; if its disk is dead, stop it: the others go on",
        )
    elif isinstance(error, pa.ArrowNotImplementedError | ProtocolError):
        notes.problem(
            "call",
            f"a gRPC server, but not a marble node: it does not answer the action 'status' ({_short(error)})",
            "check the port: another Flight or gRPC service has it",
        )
    else:
        told = from_flight_error(error)
        notes.problem("call", f"the node refuses the call: {_short(told)}", "look in the node's log")


def _short(error: Exception) -> str:
    text = str(error).split(". gRPC client debug context", 1)[0].strip()
    return text if len(text) <= 200 else f"{text[:199]}…"


def _wall_us() -> int:
    return time.time_ns() // 1000
