"""One way from this node to one peer: a bounded queue, a thread, and a Flight stream that is reopened when it breaks.

Rule 1: whoever sends never waits. What cannot be queued is dropped and the caller is told; Raft tolerates loss.
Rule 2: a batch of messages is what has gathered while the last packet was being written; nobody waits for more to come.

Invariants:
- Only the link's own thread touches the stream, except that `request_stop` cancels it.
- What counts as queued is what was accepted and neither written nor dropped.
- While the peer cannot be reached nothing is queued: what would be delivered later would be of no use then.
- Messages may be lost, and when a stream breaks the last ones may arrive twice, but one stream keeps their order.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow.flight as fl

from marble._core.entry_batch import ENTRY_SCHEMA
from marble.env import Clock, Random
from marble.errors import ProtocolError, UsageError
from marble.logs import fields
from marble.metrics import Metrics
from marble.transport.carrier import STREAM_ERRORS, Carrier, Stream
from marble.transport.codec import MESSAGES_PER_PACKET_MAX, Codec, Envelope
from marble.transport.faults import from_flight_error
from marble.transport.handshake import Handshake

_log = logging.getLogger("marble.transport")


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """Limits of a transport.

    - ``entry_bytes_max``: buffers of the entries in one packet; above the largest append that a node makes.
    - ``queue_bytes_max``, ``queue_messages_max``: per peer. A queue that is empty takes any one send.
    - ``connect_timeout_s``: one attempt to reach a peer; also how long `Link.join` may have to wait for one.
    - ``backoff_min_s``, ``backoff_max_s``: pause between attempts, doubling, of which a random half is taken off.
    - ``idle_check_s``: after this long without a message an empty packet shows whether the stream still lives.
    - ``silent_peer_s``: a connection on which the peer's kernel acknowledges nothing for so long is given up.
    - ``calls_max``: calls of clients served at once; the next one is refused.
    - ``strangers_max``: streams that have not yet said who they are; the next one is refused.
    """

    entry_bytes_max: int = 256 << 20
    queue_bytes_max: int = 64 << 20
    queue_messages_max: int = 4096
    connect_timeout_s: float = 1.0
    backoff_min_s: float = 0.02
    backoff_max_s: float = 1.0
    idle_check_s: float = 1.0
    silent_peer_s: float = 5.0
    calls_max: int = 1024
    strangers_max: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0, it is {getattr(self, name)}")
        if self.backoff_min_s > self.backoff_max_s:
            raise UsageError("backoff_min_s must not be above backoff_max_s")


class Link:
    """Messages from this node to `peer`.

    Parameters
    ----------
    peer, endpoint
        Who is there (``host:port``).
    codec
        Of this node.
    carrier
        What opens streams.
    handshake
        What is said on a stream before the first message.
    options, random, clock, metrics
        Limits; jitter; what tells how long a stream has lasted; where sent, dropped and broken are counted.
    unreachable
        Called with the peer's id, on the link's thread, whenever a stream broke or could not be opened.
    failed
        Called on the link's thread with an error that is ours; the thread ends after it.
    """

    def __init__(
        self,
        peer: int,
        endpoint: str,
        codec: Codec,
        *,
        carrier: Carrier,
        handshake: Handshake,
        options: TransportOptions,
        random: Random,
        clock: Clock,
        metrics: Metrics,
        unreachable: Callable[[int], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.peer = peer
        self.endpoint = endpoint
        self._codec = codec
        self._carrier = carrier
        self._handshake = handshake
        self._options = options
        self._random = random
        self._clock = clock
        self._unreachable = unreachable
        self._failed = failed
        self._queue: queue.SimpleQueue[Sequence[Envelope] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._queued_messages = 0
        self._accepting = True
        self._connected = threading.Event()
        self._stopping = threading.Event()
        self._stream: Stream | None = None
        self._unsent: Sequence[Envelope] = ()
        self._refusal = ""
        self._sent = metrics.counter("transport_messages_sent")
        self._packets = metrics.counter("transport_packets_sent")
        self._dropped = metrics.counter("transport_messages_dropped")
        self._broken = metrics.counter("transport_streams_broken")
        self._opened = metrics.counter("transport_streams_opened")
        self._thread = threading.Thread(target=self._run, name=f"marble-link-{codec.node_id}-{peer}", daemon=True)

    @property
    def connected(self) -> bool:
        """Whether a stream is open, as far as this node knows."""
        return self._connected.is_set()

    def start(self) -> None:
        self._thread.start()

    def send(self, envelopes: Sequence[Envelope]) -> bool:
        """Queue `envelopes`, in order, or drop all of them. Never waits. Returns whether they were queued."""
        count = len(envelopes)
        size = sum(envelope.nbytes for envelope in envelopes)
        with self._lock:
            full = self._queued_messages > 0 and (
                self._queued_messages + count > self._options.queue_messages_max
                or self._queued_bytes + size > self._options.queue_bytes_max
            )
            if accepted := self._accepting and not full:
                self._queued_messages += count
                self._queued_bytes += size
        if not accepted:
            self._dropped.add(count)
            return False
        self._queue.put(envelopes)
        return True

    def request_stop(self) -> None:
        """Let the thread end as soon as it can, whatever is queued. Returns at once."""
        self._stopping.set()
        with self._lock:
            self._accepting = False
            stream = self._stream
        self._queue.put(None)
        if stream is not None:
            stream.cancel()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end after `request_stop`; whether it has ended."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            # A broken invariant here must stop the node, not only this thread.
            self._failed(error)

    def _serve(self) -> None:
        pause_s = self._options.backoff_min_s
        while not self._stopping.is_set():
            lasted_s = 0.0
            try:
                stream = self._open()
                opened_at = self._clock.monotonic()
                try:
                    self._pump(stream)
                finally:
                    self._connected.clear()
                    lasted_s = self._clock.monotonic() - opened_at
                    with self._lock:
                        self._stream = None
                    stream.close()
            except (*STREAM_ERRORS, ProtocolError) as error:
                if self._stopping.is_set():
                    break
                self._broken.add()
                self._report(error)
                self._unreachable(self.peer)
                if lasted_s >= self._options.backoff_max_s and not getattr(error, "extra_info", b""):
                    # It worked until now, and no server said why it ended: most likely the peer was restarted. Try at
                    # once, and send again what it missed.
                    pause_s = self._options.backoff_min_s
                    continue
                self._give_up_queue()
                self._stopping.wait(self._jitter(pause_s))
                pause_s = min(2 * pause_s, self._options.backoff_max_s)

    def _report(self, error: BaseException) -> None:
        told = from_flight_error(error) if getattr(error, "extra_info", b"") else error
        # A peer that is away comes back; one that refuses this node, or is not who it should be, needs somebody's help.
        lasting = isinstance(told, ProtocolError) and str(told) != self._refusal
        if lasting:
            self._refusal = str(told)
        level = logging.WARNING if lasting else logging.INFO
        own = self._codec.node_id
        _log.log(
            level,
            "node %d lost node %d at %s: %s",
            own,
            self.peer,
            self.endpoint,
            told,
            extra=fields(node=own, peer=self.peer),
        )

    def _jitter(self, pause_s: float) -> float:
        return pause_s * self._random.randrange(500, 1001) / 1000

    def _open(self) -> Stream:
        stream = self._carrier.open(
            self.endpoint,
            ENTRY_SCHEMA,
            connect_timeout_s=self._options.connect_timeout_s,
            silent_peer_s=self._options.silent_peer_s,
        )
        with self._lock:
            self._stream = stream
        try:
            if self._stopping.is_set():
                # request_stop may have looked for a stream before there was one.
                raise fl.FlightCancelledError("the link stops")
            stream.write(self._handshake.hello(self.peer), None)
            self._handshake.call(self.peer, stream)
        except BaseException:
            stream.close()
            raise
        with self._lock:
            self._accepting = not self._stopping.is_set()
        self._connected.set()
        self._opened.add()
        return stream

    def _pump(self, stream: Stream) -> None:
        """Write what is queued until the link stops. Raises when the stream breaks."""
        while True:
            if not self._unsent:
                taken = self._take()
                if taken is None:
                    return
                self._unsent = taken
            for metadata, batch in self._codec.encode(self.peer, self._unsent):
                stream.write(metadata, batch)
                self._packets.add()
            self._sent.add(len(self._unsent))
            self._release(self._unsent)
            self._unsent = ()

    def _take(self) -> Sequence[Envelope] | None:
        """All that is queued, up to a full packet; nothing after a while without messages; None to stop."""
        try:
            first = self._queue.get(timeout=self._options.idle_check_s)
        except queue.Empty:
            return ()
        if first is None or self._queue.empty():
            return first
        taken = list(first)
        while len(taken) < MESSAGES_PER_PACKET_MAX and not self._queue.empty():
            more = self._queue.get_nowait()
            if more is None:
                return None
            taken.extend(more)
        return taken

    def _release(self, envelopes: Sequence[Envelope]) -> None:
        size = sum(envelope.nbytes for envelope in envelopes)
        with self._lock:
            self._queued_messages -= len(envelopes)
            self._queued_bytes -= size

    def _give_up_queue(self) -> None:
        """Stop accepting, and drop what is queued."""
        with self._lock:
            self._accepting = False
        waiting = list(self._unsent)
        self._unsent = ()
        while not self._queue.empty():
            more = self._queue.get_nowait()
            if more is not None:
                waiting.extend(more)
        self._dropped.add(len(waiting))
        self._release(waiting)
