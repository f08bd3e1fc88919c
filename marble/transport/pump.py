"""One stream to one peer: a thread that keeps it open, writes what a load has gathered, and reopens it when it breaks.

Rule 1: what is written together is what has gathered while the last packet was being written; nobody waits for more to come.
Rule 2: a stream that is not always needed (all but the one for control) is opened for the first message, only while the
control stream stands, and closed again after a while without messages.

Invariants:
- Only the pump's own thread touches the stream, except that others may cancel it, and one reads what the peer gives back.
- While the peer cannot be reached the load takes nothing: what would be delivered later would be of no use then.
- What was taken and not written is written again after a break if the stream had worked until then; the rest is dropped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import pyarrow as pa
import pyarrow.flight as fl

from marble.env import Clock, Random
from marble.errors import InvariantError, ProtocolError, UnauthenticatedError, UnavailableError
from marble.logs import fields
from marble.metrics import Metrics
from marble.transport.carrier import STREAM_ERRORS, Carrier, Stream
from marble.transport.codec import Lane, Packet
from marble.transport.explaining import explain
from marble.transport.faults import cause_of, from_flight_error
from marble.transport.handshake import ECHO, ONLY, SPREAD, Handshake
from marble.transport.load import Dialogue, Load
from marble.transport.options import TransportOptions
from marble.transport.pulse import Pulse

_log = logging.getLogger("marble.transport")

UNHURRIED_EVERY: Final = 4
PATIENT_EVERY: Final = 16
"""Of so many attempts to reach a peer one takes twice as long as the others, or as long as it may: for ways that are long or lose packets,
and for machines that are busy."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all streams of a transport share.

    - ``carrier``: what opens streams. ``handshake``: what is said on one before the first message.
    - ``options``, ``random``, ``clock``, ``metrics``: limits; jitter; what tells how long a stream has lasted; where sent,
      dropped and broken are counted.
    - ``unreachable``: called with the peer's id, on a pump's thread, whenever a stream broke or could not be opened.
    - ``way_lost``: called with the peer's id when one of several ways to it was lost, and whether entries were under way on it.
    - ``failed``: called on a pump's thread with an error that is ours; the thread ends after it.
    """

    carrier: Carrier
    handshake: Handshake
    options: TransportOptions
    random: Random
    clock: Clock
    metrics: Metrics
    unreachable: Callable[[int], None]
    way_lost: Callable[[int, bool], None]
    failed: Callable[[BaseException], None]


class Pump:
    """Sends `load` to node `peer` on a stream of its own.

    Parameters
    ----------
    node, peer, endpoint
        From whom to whom, and where that is.
    lane
        What the stream is for.
    schema
        Of its record batches.
    around
        What all streams share.
    gate
        None for a stream that is always open. Else it is opened when needed and while this returns True.
    opened
        Called on the pump's thread when a stream stands.
    answered
        Called, on a thread of the stream's, when the peer gave a packet back, before `pulse` hears of it.
    pulse, ping
        What measures whether the peer answers, and makes an empty packet for it to give back. None: it is not measured.
    number
        Which of several ways to the peer this is; for names.
    only
        Whether there is but one way.
    dialogue
        What more is said, if the peer understands it.
    """

    def __init__(
        self,
        node: int,
        peer: int,
        endpoint: str,
        lane: Lane,
        schema: pa.Schema,
        load: Load,
        around: Surroundings,
        *,
        gate: Callable[[], bool] | None = None,
        opened: Callable[[], None] = lambda: None,
        answered: Callable[[], None] = lambda: None,
        pulse: Pulse | None = None,
        ping: Callable[[], Packet] | None = None,
        number: int = 0,
        only: bool = False,
        dialogue: Dialogue | None = None,
    ) -> None:
        self.peer = peer
        self.endpoint = endpoint
        self.load = load
        self.trouble = ""
        """Why there is no stream, when there was none at the last look."""
        self._node = node
        self._lane = lane
        self._schema = schema
        self._around = around
        self._options = around.options
        self._gate = gate
        self._only = only
        self._on_open = opened
        self._on_answer = answered
        self._attempts = 0
        self._pulse = pulse
        self._ping = ping
        self._dialogue = dialogue
        self._talking: Dialogue | None = None
        self._listener: threading.Thread | None = None
        self._heard: BaseException | None = None
        self._broken_off = ""
        self._greeting_at: float | None = None
        self._lock = threading.Lock()
        self._connected = threading.Event()
        self._stopping = threading.Event()
        self._finishing = threading.Event()
        self._poked = threading.Event()
        self._stream: Stream | None = None
        self.features = 0
        """What both ends understood on the last stream, a bit each."""
        self._refusal = ""
        self._packets = around.metrics.counter("transport_packets_sent", peer=peer)
        self._broken = around.metrics.counter("transport_streams_broken", peer=peer)
        self._opened = around.metrics.counter("transport_streams_opened", peer=peer)
        self._round_trips = around.metrics.histogram("transport_round_trip_seconds", peer=peer)
        suffix = "" if lane is Lane.CONTROL else f"-{lane.name.lower()}"
        suffix += f"-{number}" if number else ""
        self._thread = threading.Thread(target=self._run, name=f"marble-link-{node}-{peer}{suffix}", daemon=True)
        self._started = False

    @property
    def connected(self) -> bool:
        """Whether a stream is open, as far as this node knows."""
        return self._connected.is_set()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until a stream is open; whether one is."""
        return self._connected.wait(timeout_s)

    def start(self) -> None:
        """Begin, unless it has begun or ended before."""
        if self._started:
            return
        with self._lock:
            if self._started or self._stopping.is_set():
                return
            self._started = True
            self._thread.start()

    def poke(self) -> None:
        """Try again now instead of after the pause: something says that the peer is back."""
        self._poked.set()

    def request_finish(self) -> None:
        """Let the thread end when all that is queued has been written and taken, or the stream breaks. Returns at once."""
        self._finishing.set()
        self.load.refuse()
        self._poked.set()
        self.load.wake()

    def greeting_s(self, now: float) -> float:
        """For how many seconds this node has waited for the answer to its hello; 0 if it does not."""
        since = self._greeting_at
        return 0.0 if since is None else now - since

    def break_off(self, reason: str) -> None:
        """End the stream, if there is one, because of `reason`. From any thread."""
        with self._lock:
            stream = self._stream
            if stream is not None:
                self._broken_off = reason
        if stream is not None:
            stream.cancel()

    def request_stop(self) -> None:
        """Let the thread end as soon as it can, whatever is queued. Returns at once."""
        self._stopping.set()
        self._poked.set()
        self.load.refuse()
        with self._lock:
            stream = self._stream
        self.load.wake()
        if stream is not None:
            stream.cancel()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end after `request_stop`; whether it has ended."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    @property
    def _ending(self) -> bool:
        return self._stopping.is_set() or self._finishing.is_set()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            # A broken invariant here must stop the node, not only this thread.
            self._around.failed(error)

    def _serve(self) -> None:
        pause_s = self._options.backoff_min_s
        while not self._stopping.is_set():
            if self._gate is not None and not self._wait_until_needed(self._gate):
                continue
            lasted_s = 0.0
            try:
                stream = self._open()
                opened_at = self._around.clock.monotonic()
                try:
                    self._pump(stream)
                finally:
                    self._connected.clear()
                    lasted_s = self._around.clock.monotonic() - opened_at
                    self._forget(stream)
            except (*STREAM_ERRORS, ProtocolError) as error:
                if self._ending:
                    break
                self._broken.add()
                # What the peer said last tells more than that nothing could be written any more.
                error = self._heard or error
                self._report(error)
                self._around.unreachable(self.peer)
                if lasted_s >= self._options.backoff_max_s and not getattr(error, "extra_info", b""):
                    # It worked until now, and no server said why it ended: most likely the peer was restarted. Try at
                    # once, and send again what it missed.
                    pause_s = self._options.backoff_min_s
                    continue
                self.load.give_up()
                self._pause(pause_s)
                pause_s = min(2 * pause_s, self._options.backoff_max_s)

    def _wait_until_needed(self, gate: Callable[[], bool]) -> bool:
        """Whether there is something to send, and a peer that could be reached; if not, look again."""
        if not gate():
            # While the control stream is only just being opened, what waits here is soon of use.
            self._pause(self._options.connect_timeout_s, unless=gate)
        if not gate():
            if self._finishing.is_set():
                self._stopping.set()
            if self.load.give_up():
                self._around.unreachable(self.peer)
            return False
        self.load.accept()
        if self.load.take(0.0 if self._finishing.is_set() else self._options.idle_check_s):
            return True
        if self._finishing.is_set():
            self._stopping.set()
        return False

    def _pause(self, pause_s: float, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait for some of `pause_s`, with jitter, or until somebody pokes."""
        self._poked.clear()
        if not self._ending and not unless():
            self._poked.wait(pause_s * self._around.random.randrange(500, 1001) / 1000)

    def _report(self, error: BaseException) -> None:
        told = from_flight_error(error) if getattr(error, "extra_info", b"") else error
        self.trouble = cause_of(error)
        if self._broken_off:
            self.trouble, self._broken_off = self._broken_off, ""
            told = UnavailableError(self.trouble)
        # A peer that is away comes back; one that refuses this node, or is not who it should be, needs somebody's help.
        for_long = isinstance(told, ProtocolError | UnauthenticatedError) or explain(str(error)) is not None
        lasting = for_long and self.trouble != self._refusal
        if lasting:
            self._refusal = self.trouble
        level = logging.WARNING if lasting else logging.INFO
        where = fields(node=self._node, peer=self.peer)
        _log.log(
            level, "node %d lost node %d at %s: %s", self._node, self.peer, self.endpoint, self.trouble, extra=where
        )

    def _open(self) -> Stream:
        self._attempts += 1
        self._broken_off = ""
        stream = self._around.carrier.open(
            self.endpoint,
            self._schema,
            connect_timeout_s=self._connect_s(self._attempts),
            silent_peer_s=self._silent_s,
        )
        with self._lock:
            self._stream = stream
        try:
            if self._stopping.is_set():
                # request_stop may have looked for a stream before there was one.
                raise fl.FlightCancelledError("the link stops")
            self._heard = None
            self._greeting_at = self._around.clock.monotonic()
            self.features = self._around.handshake.call(self.peer, self._lane, stream, ONLY if self._only else 0)
        except BaseException:
            self._forget(stream)
            raise
        finally:
            self._greeting_at = None
        if self._pulse is not None and self.features & ECHO:
            self._pulse.begin(self._around.clock.monotonic())
            self._start_listener(stream, partial(self._echoed, self._pulse))
        elif self._dialogue is not None and self.features & SPREAD:
            self._talking = self._dialogue
            self._start_listener(stream, self._dialogue.heard)
        self.load.accept()
        self._connected.set()
        self._attempts = 0
        self.trouble = ""
        self._opened.add()
        self._on_open()
        return stream

    @property
    def _silent_s(self) -> float:
        """After so long without an acknowledgement the kernel ends the stream's connection. Nobody pings on that for entries, and a leader
        that waits there for TCP, while its heartbeats pass, commits nothing and remains the leader.
        """
        return self._options.silent_quick_s if self._lane is Lane.LOG else self._options.silent_peer_s

    def _connect_s(self, attempt: int) -> float:
        """How long this attempt to reach the peer may take, the first being 1."""
        most_s = self._options.connect_timeout_s
        if attempt % PATIENT_EVERY == 0:
            return most_s
        return min(most_s, self._options.connect_quick_s * (2 if attempt % UNHURRIED_EVERY == 0 else 1))

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            self._stream = None
        if self._pulse is not None:
            self._pulse.end()
        stream.cancel()
        if self._listener is not None:
            # It is in a read, which the cancelling ends; the stream is not to be closed under it.
            self._listener.join(self._options.silent_peer_s)
            self._listener = None
        if self._talking is not None:
            self._talking.end()
            self._talking = None
        stream.close()

    def _start_listener(self, stream: Stream, heard: Callable[[bytes], None]) -> None:
        name = self._thread.name.replace("marble-link", "marble-echo")
        self._listener = threading.Thread(target=self._listen, args=(stream, heard), name=name, daemon=True)
        self._listener.start()

    def _echoed(self, pulse: Pulse, _: bytes) -> None:
        self._on_answer()
        taken_s = pulse.answered(self._around.clock.monotonic())
        if taken_s is not None:
            self._round_trips.observe(taken_s)

    def _listen(self, stream: Stream, heard: Callable[[bytes], None]) -> None:
        """Take what the peer answers, and notice when it ends the stream. On a thread of its own."""
        try:
            while (answer := stream.answer()) is not None:
                heard(answer)
            self._heard = fl.FlightUnavailableError("the peer ended the stream")
        except (*STREAM_ERRORS, ProtocolError) as error:
            self._heard = error
        except BaseException as error:
            self._around.failed(error)
        self.load.wake()

    def _pump(self, stream: Stream) -> None:
        """Write what is taken until the link stops, or has been idle for long. Raises when the stream breaks."""
        clock = self._around.clock
        used_at = clock.monotonic()
        if self._talking is not None and (first := self._talking.begin()) is not None:
            stream.write(*first)
        while not self._stopping.is_set():
            due_s = None if self._pulse is None else self._pulse.due_in(clock.monotonic())
            idle_s = self._options.idle_check_s
            taken = self.load.take(idle_s if due_s is None else min(due_s, idle_s))
            if self._heard is not None:
                raise self._heard
            if taken:
                used_at = clock.monotonic()
                self._write_taken(stream)
            elif self._finishing.is_set() or (
                self._gate is not None and clock.monotonic() - used_at >= self._options.idle_close_s
            ):
                # A peer that takes nothing any more is not waited for: `request_stop` cancels the stream.
                self._finish(stream)
                return
            elif self._pulse is None or due_s is None:
                self._write_taken(stream)
            if self._pulse is not None and self._ping is not None and self._pulse.due_in(clock.monotonic()) == 0:
                self._pulse.sent(clock.monotonic())
                stream.write(*self._ping())
                self._packets.add()

    def _finish(self, stream: Stream) -> None:
        if self._talking is None or self._listener is None:
            stream.finish()
        else:
            # gRPC does not bear that one thread closes its side while another one, which reads, sees the stream end.
            stream.write(*self._talking.ending())
            self._listener.join()

    def _packets_taken(self) -> Iterator[Packet]:
        """What was taken. If it cannot be made into packets the fault is ours, not the stream's: another one would not help."""
        try:
            yield from self.load.packets(self.features)
        except STREAM_ERRORS as error:
            raise InvariantError(f"messages for node {self.peer} cannot be made into packets: {error}") from error

    def _write_taken(self, stream: Stream) -> None:
        """One empty packet if that is nothing: it shows whether the stream still lives."""
        clock = self._around.clock
        spent_s = 0.0
        talking = self._talking
        for packet in self._packets_taken():
            began = clock.monotonic()
            if talking is None:
                stream.write(*packet)
            else:
                self._write_or_replace(stream, packet, talking)
            spent_s += clock.monotonic() - began
            self._packets.add()
        self.load.written(spent_s)

    def _write_or_replace(self, stream: Stream, packet: Packet, talking: Dialogue) -> None:
        instead = talking.replace(packet, self._going_on)
        began = self._around.clock.monotonic()
        stream.write(*instead)
        if instead is packet:
            talking.wrote(packet, self._around.clock.monotonic() - began)

    def _going_on(self) -> bool:
        return not self._stopping.is_set() and not self._broken_off and self._heard is None
