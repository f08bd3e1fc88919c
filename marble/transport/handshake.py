"""What two nodes tell each other before the first message: who they are, and with which data directory.

Rule 1: both ends of a stream say hello, and neither uses it before it knows the other: the one that connects sends nothing
after its hello before the answer has come, the one that is called answers before it hands anything on.
Rule 2: a node is its id *and* its directory. Whoever comes under a known id with another directory has forgotten its votes
and what it acknowledged; it is refused, at both ends (Raft §5.1: what a node answered must survive its crash).
Rule 3: where the cluster has a secret, both prove that they know it before either believes the other (`marble.transport.proof`).
Rule 4: whom this node meets it keeps from the hello on, not from the first message: followers have nothing to say to each
other until the leader is gone, and then it matters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, Protocol

import pyarrow as pa

from marble.errors import ProtocolError, UnavailableError
from marble.metrics import Metrics
from marble.transport.carrier import NO_HELLO, Stream
from marble.transport.codec import Codec, Hello, Lane
from marble.transport.compression import ALL_FEATURES
from marble.transport.proof import CalleeProof, CallerProof, Secret
from marble.types import NO_NODE

ONLY: Final = 1 << 9
"""A feature of a stream, said by who opens it: there is one way to that peer, so its earlier streams of that lane are of the past."""

ECHO: Final = 1 << 8
"""A feature: packets without messages on a stream for control are given back, on the same stream."""

SPREAD: Final = 1 << 10
"""A feature: large packets may come in parts over several ways (`marble.transport.parts`)."""

FEATURES: Final = ALL_FEATURES | ECHO | SPREAD
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


class Guest(NamedTuple):
    """Who opened a stream to this node: what it said, and how it proves that."""

    hello: Hello
    proof: CalleeProof


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
    secret
        Gives the cluster's secret, if it has one.
    """

    def __init__(
        self,
        codec: Codec,
        advertised: str,
        strangers_max: int,
        metrics: Metrics,
        secret: Callable[[], Secret | None] = lambda: None,
    ) -> None:
        self.acquaintances: Acquaintances = Forgetful()
        self.features = FEATURES
        """What this node understands beyond what every node does, a bit each."""
        self._codec = codec
        self._advertised = advertised
        self._strangers_max = strangers_max
        self._secret = secret
        self._strangers = 0
        self._lock = threading.Lock()
        self._refused = metrics.counter("transport_calls_refused")

    def hello(self, to: int, lane: Lane, features: int = 0) -> bytes:
        """What this node says to `to`, whoever of the two has called, on a stream for `lane`; to `NO_NODE`: who are you?"""
        return self._codec.hello(to, self._advertised, self.acquaintances.incarnation, lane, self.features | features)

    def greet(self, chunks: Iterator[Chunk]) -> Guest | None:
        """Find out who opened this stream; None if it ended at once. Nothing is kept of it before it has proved who it is.

        Raises ProtocolError unless it says that it is a node of this cluster, with the directory that it always had.
        """
        proof = CalleeProof(self._secret())
        with self._stranger():
            chunk = next(chunks, None)
        if chunk is None:
            # A peer that stops while it connects sends none.
            return None
        hello = self._codec.check_hello(proof.take_hello(_metadata(*chunk)))
        if not proof.needed:
            self._keep(hello)
        return Guest(hello, proof)

    def reply(self, guest: Guest) -> bytes:
        """What to answer `guest`."""
        return guest.proof.answer(self.hello(guest.hello.sender, guest.hello.lane))

    def confirm(self, guest: Guest, chunks: Iterator[Chunk]) -> bool:
        """After the answer: hear the proof of `guest`, if there must be one, and keep who it is. False if it has gone.

        Raises ProtocolError unless it is what it says, with the directory that it always had.
        """
        if guest.proof.needed:
            with self._stranger():
                chunk = next(chunks, None)
            if chunk is None:
                return False
            guest.proof.check_last_word(_metadata(*chunk))
            self._keep(guest.hello)
        return True

    def call(self, peer: int, lane: Lane, stream: Stream, features: int = 0) -> int:
        """Say hello on `stream`, with these features of its own, and wait for the answer of `peer`; return which features both have.

        Raises ProtocolError as `greet` and `confirm`, and what the stream raises.
        """
        hello, last_word = self._meet(peer, lane, stream, f"node {peer}", features)
        if hello.sender != peer:
            raise ProtocolError(f"node {hello.sender} answers at the endpoint of node {peer}")
        self._keep(hello)
        if last_word is not None:
            stream.write(last_word, None)
        return hello.features & self.features

    def ask(self, stream: Stream, endpoint: str) -> int:
        """Ask who is at the other end of `stream`, at `endpoint`; the stream is of no other use. Raises as `call`."""
        hello, _ = self._meet(NO_NODE, Lane.CONTROL, stream, f"who is at {endpoint}")
        self._keep(hello)
        return hello.sender

    def _meet(self, peer: int, lane: Lane, stream: Stream, who: str, features: int = 0) -> tuple[Hello, bytes | None]:
        """The answer to a hello, proved where there is a secret, and what is to be sent in return."""
        proof = CallerProof(self._secret())
        stream.write(proof.hello(self.hello(peer, lane, features)), None)
        answer = stream.answer()
        if answer is None:
            raise ProtocolError(f"{who} ends the stream without a hello")
        answer, last_word = proof.check_answer(answer, who)
        return self._codec.check_hello(answer), last_word

    @contextmanager
    def _stranger(self) -> Iterator[None]:
        """Count a stream while it waits for somebody who has not proved who it is."""
        with self._lock:
            refused = self._strangers >= self._strangers_max
            self._strangers += not refused
        if refused:
            self._refused.add()
            raise UnavailableError(
                f"too many streams to node {self._codec.node_id} that do not say where they come from"
            )
        try:
            yield
        finally:
            with self._lock:
                self._strangers -= 1

    def _keep(self, hello: Hello) -> None:
        self.acquaintances.meet(hello.sender, hello.incarnation)


def _metadata(metadata: pa.Buffer | None, batch: pa.RecordBatch | None) -> bytes:
    if metadata is None or batch is not None:
        raise ProtocolError(NO_HELLO)
    return bytes(metadata.to_pybytes())
