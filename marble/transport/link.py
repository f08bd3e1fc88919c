"""From this node to one peer: a few streams, so that nothing small and urgent waits behind anything large.

Rule 1: whoever sends never waits. What cannot be queued is dropped and the caller is told; Raft tolerates loss.
Rule 2: what waits for each lane, and what of it is of no use any more, is its load's to say (`marble.transport.queueing`).

Each lane is a `Pump` with a stream and a connection of its own:

- CONTROL, always open: heartbeats, votes, acknowledgements, reads, everything that is not below;
- LOG: every APPEND_ENTRIES, also an empty one. They stay in order among themselves: one that overtook another would be
  refused by the follower, and the leader would fall back to probing;
- BULK: pieces of snapshots;
- MESSAGES: what users send (`marble.transport.messages`);
- PARTS: of large packets of LOG and MESSAGES, where there are several ways to the peer (`marble.transport.spreading`).

Invariants:
- What counts as queued is what was accepted and neither written nor dropped.
- Messages may be lost, and when a stream breaks the last ones may arrive twice, but each lane keeps their order. Between lanes
  there is no order, which Raft does not need: a heartbeat's commit index is never above what the follower is known to hold.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa

from marble._core.entry_batch import ENTRY_SCHEMA
from marble._core.packing import MESSAGE_SCHEMA
from marble.logs import fields
from marble.raft.messages import MessageKind
from marble.transport.codec import Codec, Envelope, Lane
from marble.transport.handshake import SPREAD
from marble.transport.load import Dialogue, Load
from marble.transport.messages import MessageCodec, MessageLoad
from marble.transport.pulse import Pulse
from marble.transport.pump import Pump, Surroundings
from marble.transport.queueing import EnvelopeLoad
from marble.transport.sharing import OrderDialogue, PartsLoad
from marble.transport.spreading import Spreader

_log = logging.getLogger("marble.transport")
_LANES: Final = {MessageKind.APPEND_ENTRIES: Lane.LOG, MessageKind.SNAPSHOT_PIECE: Lane.BULK}


def lane_of(envelope: Envelope) -> Lane:
    """On which stream it goes."""
    return _LANES.get(envelope.message.kind, Lane.CONTROL)


class Link:
    """Messages from this node to `peer`.

    Parameters
    ----------
    peer, endpoint
        Who is there (``host:port``).
    codec
        Of this node.
    around
        What all links of this node share.
    number, spreader
        Which of several ways to the peer this is, and what spreads large packets over all of them, if it is one of several
        (`marble.transport.paths`): then it is asked more often whether it lives.
    """

    def __init__(
        self,
        peer: int,
        endpoint: str,
        codec: Codec,
        around: Surroundings,
        *,
        number: int = 0,
        spreader: Spreader | None = None,
    ) -> None:
        self.peer = peer
        self.endpoint = endpoint
        several = spreader is not None
        self._clock = around.clock
        self._options = around.options
        ping_s = min(around.options.idle_check_s, around.options.silent_quick_s / 4)
        ping_s = around.options.ping_s if several else ping_s
        self._watch_s = around.options.answer_s / 4 if several else around.options.silent_quick_s / 8
        self._pulse = Pulse(ping_s, around.options.answer_s)
        self._started = False
        self._warned = False
        loads = {
            lane: EnvelopeLoad(peer, lane, codec, around.options, around.clock, around.metrics)
            for lane in (Lane.CONTROL, Lane.LOG, Lane.BULK)
        }
        self._loads = loads
        self._messages = MessageLoad(
            peer,
            MessageCodec(codec, around.options.message_bytes_max),
            around.random.randrange(0, 2**64),
            around.options,
            around.clock,
            around.metrics,
        )

        # What was sent in parts on a stream that breaks goes another way: nothing is lost that the core must know of.
        quiet = dataclasses.replace(around, unreachable=lambda _: None)

        def pump(lane: Lane, schema: pa.Schema, load: Load, **more: Any) -> Pump:
            told = quiet if lane is Lane.PARTS else around
            return Pump(
                codec.node_id, peer, endpoint, lane, schema, load, told, number=number, only=not several, **more
            )

        self._control = pump(
            Lane.CONTROL,
            ENTRY_SCHEMA,
            loads[Lane.CONTROL],
            opened=self._poke,
            answered=self._answered,
            pulse=self._pulse,
            ping=lambda: codec.encode(peer, ())[0],
        )

        def order(lane: Lane) -> Dialogue | None:
            return None if spreader is None else OrderDialogue(spreader, lane, number)

        self._pumps = {
            Lane.CONTROL: self._control,
            Lane.LOG: pump(Lane.LOG, ENTRY_SCHEMA, loads[Lane.LOG], gate=self._reached, dialogue=order(Lane.LOG)),
            Lane.BULK: pump(Lane.BULK, ENTRY_SCHEMA, loads[Lane.BULK], gate=self._reached),
        }
        self._message_pump = self._pumps[Lane.MESSAGES] = pump(
            Lane.MESSAGES, MESSAGE_SCHEMA, self._messages, gate=self._reached, dialogue=order(Lane.MESSAGES)
        )
        if spreader is not None:
            parts = PartsLoad(spreader, number, around.metrics)
            self._pumps[Lane.PARTS] = pump(Lane.PARTS, MESSAGE_SCHEMA, parts, gate=self._takes_parts, dialogue=parts)

    def _reached(self) -> bool:
        return self._control.connected

    def _takes_parts(self) -> bool:
        return self._control.connected and bool(self._control.features & SPREAD)

    def start_parts(self) -> None:
        """There are parts of large packets to be sent."""
        if self._started and self._takes_parts():
            self._pumps[Lane.PARTS].start()

    @property
    def connected(self) -> bool:
        """Whether the peer is reached, as far as this node knows: whether the stream for control is open."""
        return self._control.connected

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until `connected`; whether it is so."""
        return self._control.wait_connected(timeout_s)

    @property
    def trouble(self) -> str:
        """Why the peer is not reached, as far as this node knows; empty if it is, or nobody knows yet."""
        return self._control.trouble

    @property
    def round_trip_s(self) -> float | None:
        """To the peer's process and back, smoothed, in seconds; None before it is known."""
        return self._pulse.round_trip_s

    def answers(self, now: float, proof_at: float = math.inf) -> bool:
        """Whether the peer is reached and gives answers in time; or does not, but was not seen to live since `proof_at`, either."""
        return self._control.connected and not self._pulse.late(now, proof_at)

    @property
    def proved_at(self) -> float:
        """When the latest packet was sent that the peer gave back here."""
        return self._pulse.proved_at

    def queued_bytes(self, lane: Lane) -> int:
        """What waits to be written on `lane`."""
        return self._loads[lane].queued_bytes

    def watch(self, now: float) -> float:
        """Break streams off whose other end has not answered for long (`TransportOptions.silent_quick_s`).

        Seconds until the next look.
        """
        silent_s, most_s = self._pulse.waited_s(now), self._options.silent_peer_s
        quick = self._pulse.overdue(now, self._options.silent_quick_s, most_s)
        for lane, pump in self._pumps.items():
            silent = silent_s > most_s if lane is Lane.MESSAGES else quick
            if silent or pump.greeting_s(now) > most_s:
                pump.break_off(f"no answer for {max(silent_s, pump.greeting_s(now)):.1f} s")
        if not self._warned and (taken_s := self._pulse.least_s) > self._options.round_trip_max_s:
            self._warned = True
            _log.warning(
                "a round trip to node %d at %s takes %.0f ms: make election_timeout_ms ten times as much, or leaders change "
                "without need",
                self.peer,
                self.endpoint,
                1000 * taken_s,
                extra=fields(peer=self.peer),
            )
        return self._watch_s

    def start(self) -> None:
        self._started = True
        self._control.start()
        for lane, load in self._loads.items():
            if not load.empty:
                self._pumps[lane].start()

    def send(self, envelopes: Sequence[Envelope]) -> bool:
        """Queue `envelopes`, those of each lane in order, or drop those of a lane. Never waits.

        Returns whether all were queued.
        """
        lanes = {lane_of(envelope) for envelope in envelopes}
        if len(lanes) == 1:
            return self._put(lanes.pop(), envelopes)
        queued = True
        for lane in sorted(lanes):
            queued &= self._put(lane, [each for each in envelopes if lane_of(each) is lane])
        return queued

    def _put(self, lane: Lane, envelopes: Sequence[Envelope]) -> bool:
        if not self._loads[lane].put(envelopes):
            return False
        if self._started:
            # The first message starts the thread of its lane.
            self._pumps[lane].start()
        return True

    def give_entries_up(self) -> None:
        """Entries go another way, where all that were sent here are sent again: what waits, or is being written, is not sent any more."""
        self._loads[Lane.LOG].drop_waiting()
        self._pumps[Lane.LOG].break_off("it does not answer, and entries go another way")

    def send_message(self, data: bytes | pa.Buffer) -> bool:
        """Queue a user's message if that is possible at once. Whether it was queued."""
        if not self._control.connected:
            return False
        self._message_pump.start()
        return self._messages.put(data)

    def send_messages(self, messages: list[bytes | pa.Buffer], timeout_s: float) -> int:
        """Queue users' messages; wait up to `timeout_s` seconds for the peer and for room. How many were queued."""
        end = self._clock.monotonic() + timeout_s
        if not self._control.connected and not self._control.wait_connected(timeout_s):
            return 0
        self._message_pump.start()
        return self._messages.put_all(messages, end - self._clock.monotonic())

    def reclaim_messages(self) -> list[bytes | pa.Buffer]:
        """Users' messages that are queued and not being written: they are so no longer. What is being written is given up, or it
        would come after what others take to the peer meanwhile.
        """
        left = self._messages.reclaim()
        self._message_pump.break_off("it does not answer, and users' messages go another way")
        return left

    @property
    def refuses_messages(self) -> bool:
        """Whether users' messages are taken no more, for good."""
        return self._messages.refusing

    def use_messages(self) -> None:
        """Take users' messages, also after `reclaim_messages`."""
        self._messages.use()

    def request_finish(self) -> None:
        """Take no more messages of users, and let those that are queued leave. Returns at once."""
        self._message_pump.request_finish()

    def wait_finished(self, timeout_s: float) -> bool:
        """Wait until they have left, after `request_finish`; whether they have."""
        return self._message_pump.join(timeout_s)

    def poke(self) -> None:
        """Try now to reach the peer, if it is not reached: something says that it is back."""
        if self._control.connected:
            self.heard()
        else:
            self._control.poke()

    def heard(self) -> None:
        """Something has come from the peer, so it lives. If it owes an answer for long all the same, what was sent to it waits in TCP,
        which sends what was lost again after pauses as long as the fault: other streams are there sooner.
        """
        if self._overdue(self._clock.monotonic()):
            self._break_off(Lane.CONTROL, Lane.LOG, Lane.BULK, Lane.PARTS)

    def request_stop(self) -> None:
        """Let the threads end as soon as they can, whatever is queued. Returns at once."""
        for pump in self._pumps.values():
            pump.request_stop()
        self._messages.drop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads' end after `request_stop`; whether all have ended within `timeout_s` seconds."""
        end = self._clock.monotonic() + timeout_s
        ended = True
        for pump in self._pumps.values():
            ended &= pump.join(end - self._clock.monotonic())
        return ended

    def _answered(self) -> None:
        """The answer to a packet has come, which is not noted yet. If it was overdue, the other streams stand still, too, as in `heard`."""
        if self._overdue(self._clock.monotonic()):
            self._break_off(Lane.LOG, Lane.BULK, Lane.PARTS)

    def _overdue(self, now: float) -> bool:
        """Whether an answer is owed for longer than by a peer that lives. While packets were lost answers took long, which says
        nothing of how long they may take now: so there is a bound that does not grow with what is usual.
        """
        quick_s = self._options.silent_quick_s
        return self._pulse.overdue(now, quick_s / 2, quick_s)

    def _break_off(self, *lanes: Lane) -> None:
        # Not that of users' messages: what is under way there and arrives late is better than what does not arrive.
        waited_s = self._pulse.waited_s(self._clock.monotonic())
        for lane in lanes:
            if lane in self._pumps:
                self._pumps[lane].break_off(f"no answer for {waited_s:.1f} s, though it lives")

    def _poke(self) -> None:
        for lane, pump in self._pumps.items():
            if lane is not Lane.CONTROL:
                pump.poke()
