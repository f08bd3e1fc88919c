"""What waits to be written to one peer on one lane: Raft's messages, in their order, bounded.

Rule 1: who queues never waits. What does not fit is dropped and the caller is told.
Rule 2: what has gathered leaves together, small appends as one (`marble.transport.merging`); what has not is not waited for.
Rule 3: entries that the core counts as lost are not sent any more if they only wait here: the core sends them again, and on a slow line
all that it sends would come twice, and late, and so be dropped again, for ever. It counts them as lost when it is told so, or that one
of them was dropped, and also for reasons that nobody here is told (the peer refused some): but then its next append of that group goes
back behind what was queued before it, or is of another term.
Rule 4: what was taken for a stream that still stands is under way there, and a leader that asks for it again, as with each sign of life
of a peer that it probes, gets an answer behind it: the question goes without the entries. On a slow line it would send nothing but
repeats else. That a peer drops what it was sent is not known here, so after `TransportOptions.silent_quick_s` they go once more.
Rule 5: little is taken at once, however much was queued at once: what is taken can be dropped no more.

Invariants:
- What counts as queued is what was accepted and neither written nor dropped.
- Of `Lane.LOG`, what waits of one group and term follows on one another: nothing goes back.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from marble._core.term_index import EntrySpan
from marble.env import Clock
from marble.metrics import Metrics
from marble.transport.codec import MESSAGES_PER_PACKET_MAX, Codec, Envelope, Lane, Packet
from marble.transport.compression import ALL_FEATURES, Squeezer, wrap
from marble.transport.merging import merge_appends
from marble.transport.options import TransportOptions

TAKEN_BYTES_MAX: Final = 2 << 20
"""What is taken of a queue at once, or one message: enough for small ones to be merged. The rest can still be dropped."""

_Item = tuple[Sequence[Envelope], int, int]
"""Messages, their bytes, and how often everything had been dropped when they were queued."""
_NOTHING: Final[_Item] = ((), 0, 0)


class EnvelopeLoad:
    """A queue of Raft messages to one peer: a `marble.transport.pump.Load`.

    Parameters
    ----------
    lane
        Which messages they are. Of `Lane.LOG` each builds on the one before: if one does not fit none of those that wait is of use.
    """

    def __init__(
        self, peer: int, lane: Lane, codec: Codec, options: TransportOptions, clock: Clock, metrics: Metrics
    ) -> None:
        self._peer = peer
        self._lane = lane
        self._squeezer = Squeezer(options.compression, clock, metrics)
        self._codec = codec
        self._options = options
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        """None only wakes. Of `Lane.LOG` each message is an item of its own."""
        self._latest: Envelope | None = None
        """What was queued last, if it waits."""
        self._ends: dict[int, tuple[int, int]] = {}
        """Of each group the term of the last append that was queued, and the index after its entries."""
        self._under_way: dict[int, tuple[Envelope, float]] = {}
        """Of each group the last entries that were taken for the stream that stands, without their rows, and when."""
        self._clock = clock
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._queued_messages = 0
        self._accepting = True
        self._refusing = False
        self._drops = 0
        """How often what waits was dropped since the core sends it again."""
        self._unsent: Sequence[Envelope] = ()
        self._unsent_drops = 0
        """What `_drops` was when the first of `_unsent` was queued."""
        self._sent = metrics.counter("transport_messages_sent", peer=peer)
        self._dropped = metrics.counter("transport_messages_dropped", peer=peer)

    def put(self, envelopes: Sequence[Envelope]) -> bool:
        """Queue `envelopes`, in order, or drop all of them. Never waits. Returns whether they were queued.

        A leader repeats what it asked a peer with each sign of life of that: what waits already is not queued again.
        """
        with self._lock:
            if len(envelopes) == 1 and self._accepting and _repeats(envelopes[0], self._latest):
                return True
            if self._accepting and self._lane is Lane.LOG:
                envelopes = self._begin_anew([self._without_repeat(envelope) for envelope in envelopes])
            count = len(envelopes)
            size = sum(envelope.nbytes for envelope in envelopes)
            full = self._queued_messages > 0 and (
                self._queued_messages + count > self._options.queue_messages_max
                or self._queued_bytes + size > self._options.queue_bytes_max
            )
            if accepted := self._accepting and not full:
                self._queued_messages += count
                self._queued_bytes += size
                if self._lane is Lane.LOG:
                    self._latest = envelopes[-1]
                    for envelope in envelopes:
                        self._queue.put(((envelope,), envelope.nbytes, self._drops))
                else:
                    self._queue.put((envelopes, size, self._drops))
        if not accepted:
            self._dropped.add(count)
            if full and self._lane is Lane.LOG:
                self.drop_waiting()
        return accepted

    def _begin_anew(self, envelopes: Sequence[Envelope]) -> Sequence[Envelope]:
        """`envelopes` but for those behind which a later one of them goes back; those that wait here are dropped. Under the lock."""
        kept: list[Envelope] = []
        for envelope in envelopes:
            group, message = envelope.group, envelope.message
            term, end = self._ends.get(group, (message.term, 0))
            if message.term != term or message.log_index + 1 < end:
                others = [each for each in kept if each.group != group]
                self._dropped.add(len(kept) - len(others))
                kept = others
                self._drop_of(group)
            kept.append(envelope)
            entries = 0 if message.entries is None else len(message.entries)
            self._ends[group] = (message.term, message.log_index + 1 + entries)
        return kept

    def _without_repeat(self, envelope: Envelope) -> Envelope:
        """`envelope`, without its entries if they are under way. Under the lock."""
        taken, at = self._under_way.get(envelope.group, (None, 0.0))
        if not _repeats(envelope, taken) or self._clock.monotonic() - at > self._options.silent_quick_s:
            return envelope
        first = envelope.message.log_index + 1
        return Envelope(envelope.group, replace(envelope.message, entries=EntrySpan.of(first, []), changes=()))

    def _drop_of(self, group: int) -> None:
        """Drop what waits of `group`, from which on its core begins anew. Under the lock."""
        self._drops += 1
        self._latest = None
        waiting = self._drain()
        for each in waiting:
            if each.group != group:
                self._queue.put(((each,), each.nbytes, self._drops))
        dropped = [each for each in waiting if each.group == group]
        self._dropped.add(len(dropped))
        self._uncount(dropped)
        # One that only wakes may have gone, too.
        self._queue.put(None)

    def drop_waiting(self) -> None:
        """Drop what was not taken by the pump, and what was, if it is not written now but would be on another stream. From any thread."""
        with self._lock:
            self._drops += 1
            self._ends.clear()
            waiting = self._drain()
            self._uncount(waiting)
        self._dropped.add(len(waiting))
        # One that only wakes may have gone, too.
        self.wake()

    def _drain(self) -> list[Envelope]:
        self._latest = None
        waiting: list[Envelope] = []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.extend((self._queue.get_nowait() or _NOTHING)[0])
        return waiting

    @property
    def queued_bytes(self) -> int:
        """What was accepted and neither written nor dropped."""
        return self._queued_bytes

    @property
    def empty(self) -> bool:
        """Whether nothing is queued."""
        return self._queued_messages == 0

    def accept(self) -> None:
        with self._lock:
            self._accepting = not self._refusing
            # Another stream is to come, or has.
            self._under_way.clear()

    def refuse(self) -> None:
        with self._lock:
            self._accepting, self._refusing = False, True

    def wake(self) -> None:
        self._queue.put(None)

    def take(self, timeout_s: float) -> bool:
        if self._unsent:
            if self._unsent_drops == self._drops:
                self._note_under_way()
                return True
            # It was taken for a stream that is gone, and the core has begun anew.
            self._give_up_unsent()
        try:
            first = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return False
        if first is None:
            return False
        self._latest = None
        taken, size, self._unsent_drops = first
        if not self._queue.empty():
            taken = list(taken)
            with contextlib.suppress(queue.Empty):
                while len(taken) < MESSAGES_PER_PACKET_MAX and size < TAKEN_BYTES_MAX:
                    more, more_bytes, _ = self._queue.get_nowait() or _NOTHING
                    taken.extend(more)
                    size += more_bytes
            # Only what surely waits counts as such: after all that was taken.
            self._latest = None
        self._unsent = taken
        self._note_under_way()
        return True

    def _note_under_way(self) -> None:
        """What was taken goes on the stream that stands, if one does: when one opens it is noted again."""
        if self._lane is Lane.LOG:
            now = self._clock.monotonic()
            asked = {each.group: (each._replace(batch=None), now) for each in self._unsent if each.message.entries}
            with self._lock:
                self._under_way.update(asked)

    def packets(self, features: int) -> list[Packet]:
        envelopes = merge_appends(self._unsent) if len(self._unsent) > 1 else self._unsent
        packets = self._codec.encode(self._peer, envelopes)
        return [wrap(packet, self._squeezer, features) for packet in packets] if features & ALL_FEATURES else packets

    def written(self, seconds: float) -> None:
        self._sent.add(len(self._unsent))
        self._squeezer.wrote(self._release(self._unsent), seconds)
        self._unsent = ()

    def give_up(self) -> int:
        with self._lock:
            self._accepting = False
            waiting = self._drain()
            self._uncount(waiting)
        self._dropped.add(len(waiting))
        return len(waiting) + self._give_up_unsent()

    def _give_up_unsent(self) -> int:
        unsent, self._unsent = self._unsent, ()
        self._dropped.add(len(unsent))
        self._release(unsent)
        return len(unsent)

    def _release(self, envelopes: Sequence[Envelope]) -> int:
        """They count no longer; how many bytes that are."""
        with self._lock:
            return self._uncount(envelopes)

    def _uncount(self, envelopes: Sequence[Envelope]) -> int:
        """The same, under the lock."""
        size = sum(envelope.nbytes for envelope in envelopes)
        self._queued_messages -= len(envelopes)
        self._queued_bytes -= size
        return size


def _repeats(envelope: Envelope, earlier: Envelope | None) -> bool:
    """Whether it asks for the same entries to be appended as `earlier`."""
    if earlier is None or earlier.group != envelope.group or not envelope.message.entries:
        return False
    one, other = envelope.message, earlier.message
    return (one.term, one.log_index, one.entries) == (other.term, other.log_index, other.entries)
