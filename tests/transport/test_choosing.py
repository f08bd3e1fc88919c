"""Which of several ways is taken, and who is told when one is lost: by what the ways say of themselves, at times that a test gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa
import pytest
from hand_clock import HandClock

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.env import SystemRandom
from marble.metrics import Metrics
from marble.raft.messages import Message, MessageKind
from marble.transport.carrier import FlightCarrier
from marble.transport.codec import Codec, Envelope, Lane
from marble.transport.handshake import Handshake
from marble.transport.options import TransportOptions
from marble.transport.paths import QUIET_S, Paths
from marble.transport.pulse import Pulse
from marble.transport.pump import Surroundings
from marble.types import EntryKind

OPTIONS = TransportOptions(ping_s=0.05, answer_s=0.1)
CODEC = Codec("c", 1, 1 << 30)
STEP_S = 0.01


class Way:
    """In the place of a `Link`: its pulse is a real one."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.pulse = Pulse(OPTIONS.ping_s, OPTIONS.answer_s)
        self.connected = True
        self.refuses_messages = False
        self.sent: list[Envelope] = []
        self.round_trip_s: float | None = 0.001
        self.reclaimed = 0
        self.given_up = 0

    def answers(self, now: float, proof_at: float = math.inf) -> bool:
        return self.connected and not self.pulse.late(now, proof_at)

    @property
    def proved_at(self) -> float:
        return self.pulse.proved_at

    def queued_bytes(self, lane: Lane) -> int:
        return 0

    def send(self, envelopes: Sequence[Envelope]) -> bool:
        self.sent.extend(envelopes)
        return self.connected

    def watch(self, now: float) -> float:
        return STEP_S

    def reclaim_messages(self) -> list[bytes]:
        self.reclaimed += 1
        return []

    def give_entries_up(self) -> None:
        self.given_up += 1

    def use_messages(self) -> None:
        """Nothing is kept here."""


class Scene:
    """Two ways to node 2, whose process and whose networks do as they are told."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.told: list[str] = []
        metrics = Metrics()
        around = Surroundings(
            FlightCarrier(),
            Handshake(CODEC, "127.0.0.1:1", 1, metrics),
            OPTIONS,
            SystemRandom(1),
            self.clock,
            metrics,
            unreachable=lambda peer: self.told.append("unreachable"),
            way_lost=lambda peer, carried: self.told.append("entries lost" if carried else "way lost"),
            failed=lambda error: self.told.append(repr(error)),
        )
        self.paths = Paths(2, "127.0.0.1:1,127.0.0.1:2", CODEC, around)
        self.ways = [Way("a"), Way("b")]
        self.paths._links = self.ways  # type: ignore[assignment]
        self.working = [True, True]
        self.still = False
        """Whether the peer's process stands still."""
        for at, way in enumerate(self.ways):
            # They are not asked at the same moment.
            way.pulse.begin(self.clock.now + 2 * at * STEP_S)
        self.run(1.0)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            self.clock.now += STEP_S
            now = self.clock.now
            for way, working in zip(self.ways, self.working, strict=True):
                if working and not self.still:
                    while way.pulse.answered(now) is not None:
                        pass
                if way.pulse.due_in(now) == 0.0:
                    way.pulse.sent(now)
            self.paths.watch(now)

    def send(self, envelope: Envelope) -> int:
        """Send it; the way that it went."""
        before = [len(way.sent) for way in self.ways]
        assert self.paths.send([envelope])
        return next(at for at, way in enumerate(self.ways) if len(way.sent) > before[at])

    def lose(self, at: int) -> None:
        """A stream there breaks."""
        self.ways[at].connected = False
        self.paths._broken(at)(2)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def append(group: int = 0) -> Envelope:
    batch = entry_batch.build(group, 1, 1, [Proposal(EntryKind.WRITE, 1, pa.py_buffer(bytes(64)), 0, 0)])
    message = Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, log_index=0, entries=entry_batch.span(batch))
    return Envelope(group, message, batch)


BEAT = Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1))


@pytest.mark.parametrize("group", [0, 1])
def test_a_peer_that_stands_still_changes_nothing(scene: Scene, group: int) -> None:
    """All its ways are late then, one a little sooner than the other: what is under way on that is not lost."""
    way = scene.send(append(group))
    scene.still = True
    for _ in range(200):
        scene.run(0.01)
        assert scene.send(append(group)) == way
        assert scene.send(BEAT) == 0
    scene.still = False
    scene.run(1.0)
    assert scene.told == []
    assert [each.reclaimed for each in scene.ways] == [0, 0]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_silent_way_is_left_within_three_quarters_of_a_heartbeat(scene: Scene, bad: int) -> None:
    # A round trip and what is left of a pause between two questions are in it.
    scene.working[bad] = False
    scene.run(1.5 * OPTIONS.answer_s + 2 * STEP_S)
    assert scene.send(append(bad)) == scene.send(BEAT) == 1 - bad


def test_entries_stay_where_they_are_when_their_first_way_is_back(scene: Scene) -> None:
    """Else those that are sent next would overtake all that is under way."""
    scene.working[0] = False
    scene.run(0.2)
    assert scene.send(append()) == 1
    scene.working[0] = True
    for _ in range(30):
        scene.run(0.1)
        assert scene.send(append()) == 1
    scene.run(QUIET_S + 0.1)
    assert scene.send(append()) == 0


def test_the_core_is_told_of_a_way_with_entries_and_only_of_that(scene: Scene) -> None:
    """Told of another one it would send all again that is under way."""
    assert scene.send(append()) == 0
    scene.paths._first = 1
    assert scene.send(BEAT) == 1
    scene.working[1] = False
    scene.run(1.0)
    assert scene.told == ["way lost"]
    scene.lose(1)
    scene.run(1.0)
    assert scene.told == ["way lost"]
    scene.working[0] = False
    scene.ways[1].connected = scene.working[1] = True
    scene.run(1.0)
    assert scene.told == ["way lost", "entries lost"]
    assert [way.given_up for way in scene.ways] == [1, 0]
    scene.lose(0)
    assert scene.told == ["way lost", "entries lost"]


def test_the_core_is_told_when_the_last_way_is_gone(scene: Scene) -> None:
    scene.lose(1)
    assert scene.told == []
    scene.lose(0)
    assert scene.told == ["unreachable"]
