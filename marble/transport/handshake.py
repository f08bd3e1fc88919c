"""What two nodes tell each other before the first message: who they are, and with which data directory.

Rule 1: both ends of a stream say hello, and neither uses it before it knows the other: the one that connects sends nothing
after its hello before the answer has come, the one that is called answers before it hands anything on.
Rule 2: a node is its id *and* its directory. Whoever comes under a known id with another directory has forgotten its votes
and what it acknowledged; it is refused, at both ends (Raft §5.1: what a node answered must survive its crash).
Rule 3: whom this node meets it keeps from the hello on, not from the first message: followers have nothing to say to each
other until the leader is gone, and then it matters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final, Protocol

import pyarrow as pa

from marble.errors import ProtocolError, UnavailableError
from marble.metrics import Metrics
from marble.transport.carrier import NO_HELLO, Stream
from marble.transport.codec import Codec, Hello, Lane
from marble.transport.compression import ALL_FEATURES
from marble.types import NO_NODE

ECHO: Final = 1 << 8
"""A feature: packets without messages on a stream for control are given back, on the same stream."""

FEATURES: Final = ALL_FEATURES | ECHO
"""What this node understands beyond what every node does, a bit each."""

Chunk = tuple[pa.Buffer | None, pa.RecordBatch | None]
"""As an `Arrival` gives it."""


class Acquaintances(Protocol):
    """Which directory this node has and which ones the others have: `marble.identity.Acquaintances`."""

    @property
    def incarnation(self) -> int:
        """Of this node's own directory."""
        ...

    def meet(self, node: int, incarnation: int) -> None:
        """Keep for good that `node` has this directory. Raises ProtocolError if it is known with another one."""
        ...


class Forgetful:
    """For transports without a data directory: it tells nothing and takes everybody for who they say they are."""

    incarnation = 0

    def meet(self, node: int, incarnation: int) -> None:
        """Nothing is kept."""


class Handshake:
    """One node's part in opening streams. Thread-safe; `acquaintances` is set before the first stream is opened.

    Parameters
    ----------
    codec
        Of this node.
    advertised
        Where it takes answers.
    strangers_max
        How many streams may be open that have not said yet who they are.
    metrics
        Where refused calls are counted.
    """

    def __init__(self, codec: Codec, advertised: str, strangers_max: int, metrics: Metrics) -> None:
        self.acquaintances: Acquaintances = Forgetful()
        self.features = FEATURES
        """What this node understands beyond what every node does, a bit each."""
        self._codec = codec
        self._advertised = advertised
        self._strangers_max = strangers_max
        self._strangers = 0
        self._lock = threading.Lock()
        self._refused = metrics.counter("transport_calls_refused")

    def hello(self, to: int, lane: Lane) -> bytes:
        """What this node says to `to`, whoever of the two has called, on a stream for `lane`; to `NO_NODE`: who are you?"""
        return self._codec.hello(to, self._advertised, self.acquaintances.incarnation, lane, self.features)

    def greet(self, chunks: Iterator[Chunk]) -> Hello | None:
        """Find out who opened this stream; None if it ended at once.

        Raises ProtocolError unless it is a node of this cluster, with the directory that it always had.
        """
        with self._lock:
            refused = self._strangers >= self._strangers_max
            self._strangers += not refused
        if refused:
            self._refused.add()
            raise UnavailableError(
                f"too many streams to node {self._codec.node_id} that do not say where they come from"
            )
        try:
            chunk = next(chunks, None)
            # A peer that stops while it connects sends none.
            return None if chunk is None else self._check(*chunk)
        finally:
            with self._lock:
                self._strangers -= 1

    def call(self, peer: int, stream: Stream) -> int:
        """Wait for the answer to this node's hello to `peer`; return which features both have.

        Raises ProtocolError as `greet`, and what the stream raises.
        """
        hello = self._answer(stream, f"node {peer}")
        if hello.sender != peer:
            raise ProtocolError(f"node {hello.sender} answers at the endpoint of node {peer}")
        return hello.features & self.features

    def ask(self, stream: Stream, endpoint: str) -> int:
        """Ask who is at the other end of `stream`, at `endpoint`; the stream is of no other use. Raises as `call`."""
        stream.write(self.hello(NO_NODE, Lane.CONTROL), None)
        return self._answer(stream, f"who is at {endpoint}").sender

    def _answer(self, stream: Stream, who: str) -> Hello:
        answer = stream.answer()
        if answer is None:
            raise ProtocolError(f"{who} ends the stream without a hello")
        return self._know(answer)

    def _check(self, metadata: pa.Buffer | None, batch: pa.RecordBatch | None) -> Hello:
        if metadata is None or batch is not None:
            raise ProtocolError(NO_HELLO)
        return self._know(metadata.to_pybytes())

    def _know(self, metadata: bytes) -> Hello:
        hello = self._codec.check_hello(metadata)
        self.acquaintances.meet(hello.sender, hello.incarnation)
        return hello
