"""Several ways to one peer: a node may be reached at several addresses, over networks that fail apart from one another.

Each address is a `Link` of its own, with its streams open all the time, so that to change the way takes no connecting.

- Control goes the quickest way that answers. Another must be much quicker before it takes its place.
- Entries of a group stay on one way, for they must stay in order: group ``g`` on the ``g``-th, round and round, of those that
  answer, in the order of the addresses. So groups share the ways, and one group alone uses the first that works. What is under way is
  worth more than the right place: a group changes its way only when that does not answer, or when it has sent nothing for `QUIET_S`.
- Users' messages stay on one way for as long as it answers.
- Where one way is what entries or users' messages wait for, large packets of them go over all ways, in parts
  (`marble.transport.spreading`); the order stays with the one way.
- Pieces of snapshots, whose order does not matter, go wherever least is queued: over all ways at once.

Rule 1: who does not answer in time is not used while somebody else does. If nobody answers, everything stays where it is: a node
that is slow is slow on all its ways. A way is not taken for dead because its answer is late, but because it is and another way has brought
the answer to a later question.
Rule 2: when a way that carried entries stops answering, the core is told: what was under way there is probably lost, and given up,
and the core finds out what the peer has by asking, at once. Of other ways it is not told, since it would send all again that is under
way on those that work; only those are who have connections to the peer of their own.

Invariants:
- Between two ways there is no order. When a group changes its way an append may overtake another, once; Raft refuses it and
  repeats.
- Thread-safe. No thread of its own; `watch` is called every now and then by `marble.transport.watch`.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Final

import pyarrow as pa

from marble.config import canonical_endpoint
from marble.transport.codec import Codec, Envelope, Lane
from marble.transport.link import Link, lane_of
from marble.transport.parts import PartsCodec
from marble.transport.pump import Surroundings
from marble.transport.spreading import Spreader

LOOK_S: Final = 0.02
"""Between two looks whether any way stands, for who waits for one."""

WAY_S: Final = 0.1
"""How long a message waits for room on one way before it is seen whether that is still the way to take."""

QUIET_S: Final = 1.0
"""A group that has sent no entries for so long has none under way that others could overtake."""

QUICKER: Final = 0.7
"""A way takes over the control from one that answers if its round trip is at most this part of the other's."""


def addresses_of(endpoint: str) -> tuple[str, ...]:
    """The addresses in ``host:port`` or ``host:port,host:port``. Raises UsageError if they are none, or too many."""
    return tuple(canonical_endpoint(endpoint).split(","))


class Paths:
    """Messages from this node to `peer`, with the same methods as a `Link`.

    Parameters
    ----------
    peer, endpoint
        Who is there, and at which addresses, those first that are to be used first.
    codec
        Of this node.
    around
        What all links of this node share.
    """

    def __init__(self, peer: int, endpoint: str, codec: Codec, around: Surroundings) -> None:
        self.peer = peer
        self.endpoint = endpoint
        self._clock = around.clock
        self._unreachable = around.unreachable
        self._way_lost = around.way_lost
        self._moved = around.metrics.counter("transport_paths_changed")
        addresses = addresses_of(endpoint)
        self._spreader = Spreader(
            peer,
            len(addresses),
            PartsCodec(codec),
            around.options.answer_s,
            around.clock,
            around.random,
            around.metrics,
        )
        self._spreader.wanted = self._start_parts
        self._links = [
            Link(
                peer,
                address,
                codec,
                dataclasses.replace(around, unreachable=self._broken(at)),
                number=at,
                spreader=self._spreader,
            )
            for at, address in enumerate(addresses)
        ]
        self._used = [False] * len(self._links)
        self._carried = [False] * len(self._links)
        """Whether entries were sent there, since the core was last told."""
        self._places: dict[int, tuple[int, float]] = {}
        """Of each group the way of its entries, and when the last of them were sent."""
        self._first = 0
        self._lock = threading.Lock()
        self._message_way = 0

    @property
    def connected(self) -> bool:
        """Whether the peer is reached on any way, as far as this node knows."""
        return any(link.connected for link in self._links)

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until `connected`; whether it is so."""
        end = self._clock.monotonic() + timeout_s
        while not self.connected:
            left_s = end - self._clock.monotonic()
            if left_s <= 0 or self._links[0].refuses_messages:
                return False
            # Nobody tells which of them it will be.
            self._links[0].wait_connected(min(left_s, LOOK_S))
        return True

    @property
    def trouble(self) -> str:
        """Why the peer is not reached; empty if it is, or nothing is known."""
        return "" if self.connected else "; ".join(link.trouble for link in self._links if link.trouble)

    @property
    def round_trip_s(self) -> float | None:
        """Of the way that control takes, smoothed, in seconds; None before it is known."""
        return self._links[self._first].round_trip_s

    def states(self) -> list[tuple[str, bool, float | None]]:
        """Of each way its address, whether it answers, and its round trip in seconds, if known."""
        answering = self._answering(self._clock.monotonic())
        return [
            (link.endpoint, answers, link.round_trip_s) for link, answers in zip(self._links, answering, strict=True)
        ]

    def _answering(self, now: float) -> list[bool]:
        """Of each way whether it answers, as far as can be told."""
        proof_at = max(link.proved_at for link in self._links)
        return [link.answers(now, proof_at) for link in self._links]

    def start(self) -> None:
        for link in self._links:
            link.start()

    def send(self, envelopes: Sequence[Envelope]) -> bool:
        """Queue `envelopes`, those of each lane and group in order, or drop those of some. Never waits.

        Returns whether all were queued.
        """
        parts: dict[int, list[Envelope]] = {}
        now = self._clock.monotonic()
        live = self._live(now)
        for envelope in envelopes:
            at = self._way(envelope, live, now)
            if lane_of(envelope) is Lane.LOG:
                # Not by reading what is there: who is told meanwhile, on another thread, would be told twice.
                self._carried[at] = True
            parts.setdefault(at, []).append(envelope)
        queued = True
        for at, part in parts.items():
            if self._links[at].send(part):
                self._used[at] = True
            else:
                queued = False
        return queued

    def _way(self, envelope: Envelope, live: list[int], now: float) -> int:
        lane = lane_of(envelope)
        if lane is Lane.CONTROL:
            return self._first
        if lane is Lane.BULK:
            return min(live, key=lambda at: self._links[at].queued_bytes(Lane.BULK))
        at, sent_at = self._places.get(envelope.group, (-1, now))
        if at not in live or now - sent_at > QUIET_S:
            at = live[envelope.group % len(live)]
        self._places[envelope.group] = at, now
        return at

    def _live(self, now: float) -> list[int]:
        """The ways that answer; all if none does. Sees to it that the control is on one that does."""
        live = [at for at, answers in enumerate(self._answering(now)) if answers]
        if not live:
            return list(range(len(self._links)))
        quickest = min(live, key=self._round_trip)
        first = self._first
        if first not in live or self._round_trip(quickest) < QUICKER * self._round_trip(first):
            self._first = quickest
            self._moved.add()
        return live

    def _round_trip(self, at: int) -> float:
        taken_s = self._links[at].round_trip_s
        return 1e9 if taken_s is None else taken_s

    def _start_parts(self) -> None:
        for link in self._links:
            link.start_parts()

    def _broken(self, at: int) -> Callable[[int], None]:
        def broken(peer: int) -> None:
            # A way that is down for long is tried again and again, which is nobody's business while another works.
            self._tell(at, unreachable=not self.connected)

        return broken

    def _tell(self, at: int, unreachable: bool) -> None:
        """Way `at` is lost: tell who has used it, once, or that with it the peer is `unreachable`."""
        used, self._used[at] = self._used[at], False
        carried, self._carried[at] = self._carried[at], False
        if carried:
            self._links[at].give_entries_up()
        if unreachable:
            self._unreachable(self.peer)
        elif used or carried:
            self._way_lost(self.peer, carried)

    def send_message(self, data: bytes | pa.Buffer) -> bool:
        """Queue a user's message if that is possible at once. Whether it was queued."""
        return self._links[self._messages_way()].send_message(data)

    def send_messages(self, messages: list[bytes | pa.Buffer], timeout_s: float) -> int:
        """Queue users' messages; wait up to `timeout_s` seconds for the peer and for room. How many were queued, in order."""
        end = self._clock.monotonic() + timeout_s
        if not self.wait_connected(timeout_s):
            return 0
        queued = 0
        while True:
            left_s = end - self._clock.monotonic()
            link = self._links[self._messages_way()]
            # Not for long at a time: the way may change meanwhile.
            queued += link.send_messages(messages[queued:], max(0.0, min(left_s, WAY_S)))
            if queued == len(messages) or left_s <= 0 or link.refuses_messages:
                return queued

    def _messages_way(self) -> int:
        """The way of users' messages, all of them, for they are to arrive in order: it changes only when it does not answer.

        What is queued there then comes along, but for what is being written or under way, which does not arrive any more if it has
        not by then.
        """
        with self._lock:
            before, live = self._message_way, self._live(self._clock.monotonic())
            if before not in live:
                self._message_way = min(live, key=self._round_trip)
                if self._message_way != before:
                    left = self._links[before].reclaim_messages()
                    self._links[self._message_way].use_messages()
                    if left:
                        self._links[self._message_way].send_messages(left, 0.0)
            return self._message_way

    def request_finish(self) -> None:
        """Take no more messages of users, and let those that are queued leave. Returns at once."""
        for link in self._links:
            link.request_finish()

    def wait_finished(self, timeout_s: float) -> bool:
        """Wait until they have left, after `request_finish`; whether they have."""
        end = self._clock.monotonic() + timeout_s
        return all(link.wait_finished(end - self._clock.monotonic()) for link in self._links)

    def watch(self, now: float) -> float:
        """Look after the ways: see `Link.watch`. Seconds until the next look."""
        pause_s = min(link.watch(now) for link in self._links)
        answering = self._answering(now)
        self._spreader.watch(now, answering, max(link.proved_at for link in self._links))
        self._messages_way()
        if any(answering):
            for at, answers in enumerate(answering):
                if not answers:
                    self._tell(at, unreachable=False)
        return pause_s

    def poke(self) -> None:
        """Try now to reach the peer where it is not reached: something says that it is back."""
        for link in self._links:
            link.poke()

    def heard(self) -> None:
        """The peer lives. Which of the ways would reach it is not known by that, and a way that does not answer is left in time."""

    def request_stop(self) -> None:
        """Let the threads end as soon as they can, whatever is queued. Returns at once."""
        for link in self._links:
            link.request_stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads' end after `request_stop`; whether all have ended within `timeout_s` seconds."""
        end = self._clock.monotonic() + timeout_s
        ended = True
        for link in self._links:
            ended &= link.join(end - self._clock.monotonic())
        return ended


Peering = Link | Paths
"""What reaches one peer."""


def make_link(peer: int, endpoint: str, codec: Codec, around: Surroundings) -> Peering:
    """The way, or ways, to `peer` at `endpoint`."""
    kind = Paths if "," in endpoint else Link
    return kind(peer, endpoint, codec, around)
