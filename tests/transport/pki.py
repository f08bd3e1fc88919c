"""Certificates for tests, and transports that use them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.flight as fl

from marble.certs import issue, make_authority
from marble.config import SecurityConfig, TlsConfig, TokensConfig
from marble.metrics import Metrics
from marble.raft.messages import Message, MessageKind
from marble.transport.admission import demand
from marble.transport.codec import Envelope
from marble.transport.flight import FlightTransport
from marble.transport.options import TransportOptions
from marble.transport.security import Credentials
from marble.transport.tokens import ANYWHERE, Access
from marble.transport.watching import WatchedSecurity

DEADLINE_S = 30.0
QUICK = TransportOptions(backoff_min_s=0.01, backoff_max_s=0.02, idle_check_s=0.05)
LOCAL = ("127.0.0.1", "localhost")


@functools.cache
def _made(name: str) -> tuple[bytes, bytes]:
    return make_authority(f"test CA {name}")


def authority(name: str = "first") -> tuple[bytes, bytes]:
    """A CA; the same one for the same name."""
    return _made(name)


@dataclasses.dataclass
class Files:
    """The files of one node in `directory`."""

    directory: Path

    def put(self, name: str, data: bytes) -> Path:
        # As one who replaces certificates should: whole, by a rename.
        fresh = self.directory / f"{name}.new"
        fresh.write_bytes(data)
        return fresh.replace(self.directory / name)

    def pair(self, name: str, pair: tuple[bytes, bytes]) -> tuple[Path, Path]:
        return self.put(f"{name}.pem", pair[0]), self.put(f"{name}.key", pair[1])

    def node(
        self, *, by: str = "first", trusts: str | None = None, names: tuple[str, ...] = LOCAL, **more: Any
    ) -> TlsConfig:
        """The certificate of a node, and what it trusts: the CA that signed it, or another."""
        days = {key: more.pop(key) for key in ("days", "begins_days") if key in more}
        certificate, key = self.pair("node", issue(authority(by), names, serves=True, **days))
        return TlsConfig(certificate, key, self.put("ca.pem", authority(trusts or by)[0]), reload_s=0.05, **more)

    def secret(self, text: str = "s") -> Path:
        return self.put("secret", base64.b64encode(text.encode() * 32))

    def tokens(self, text: str) -> TokensConfig:
        return TokensConfig(self.put("tokens.toml", text.encode()), reload_s=0.05)


def client(
    by: str | None = None, trusts: str = "first", names: tuple[str, ...] = ("someone",), **more: Any
) -> Credentials:
    """A client that trusts a CA, and has a certificate of another if `by` names one."""
    pair = (None, None) if by is None else issue(authority(by), names, serves=False)
    return Credentials(True, authority(trusts)[0], *pair, **more)


class Service:
    """Answers the action "who" to those who may read."""

    def do_action(self, context: Any, action: fl.Action) -> Iterator[bytes]:
        demand(context, Access.READ, ANYWHERE)
        return iter([b"you"])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Node:
    """A transport, what it receives, and what it counted."""

    def __init__(
        self, number: int, security: SecurityConfig, options: TransportOptions = QUICK, service: Any = None
    ) -> None:
        self.number = number
        self.metrics = Metrics()
        watched = WatchedSecurity(security, number, self.metrics)
        self.security = watched
        self.transport = FlightTransport(
            "127.0.0.1:0", "c", number, options=options, metrics=self.metrics, security=watched
        )
        self.inbox: queue.SimpleQueue[list[Envelope]] = queue.SimpleQueue()
        self.service = service or Service()

    @property
    def endpoint(self) -> str:
        return self.transport.endpoint

    def start(self, *peers: Node) -> Node:
        self.transport.set_peers({peer.number: peer.endpoint for peer in peers})
        self.transport.start(self.inbox.put, self.service)
        return self

    def beat(self, to: Node) -> None:
        """Send heartbeats until one is taken by a link that stands."""
        message = Message(MessageKind.HEARTBEAT, self.number, to.number, 1)
        pause = threading.Event()
        end = time.monotonic() + DEADLINE_S
        while not (self.transport.connected(to.number) and self.transport.send(to.number, [Envelope(0, message)])):
            assert time.monotonic() < end, "no link"
            pause.wait(0.002)

    def count(self, name: str) -> int:
        value = self.metrics.snapshot().get(name, 0)
        assert isinstance(value, int)
        return value


def ask(endpoint: str, credentials: Credentials) -> bytes:
    """Do the action "who" at `endpoint`, over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)]
    with credentials.client(endpoint, options) as made:
        (answer,) = made.do_action(fl.Action("who", b""), fl.FlightCallOptions(timeout=DEADLINE_S))
        return bytes(answer.body.to_pybytes())


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, what
        pause.wait(0.005)


@contextlib.contextmanager
def running(*nodes: Node) -> Iterator[None]:
    try:
        yield
    finally:
        for node in nodes:
            node.transport.stop(5.0)
