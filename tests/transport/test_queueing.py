"""What waits for one peer on one lane, and what of it is of no use any more."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hand_clock import HandClock

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.term_index import EntrySpan
from marble.metrics import Metrics
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Codec, Envelope, Lane
from marble.transport.options import TransportOptions
from marble.transport.queueing import TAKEN_BYTES_MAX, EnvelopeLoad
from marble.types import EntryKind

MIB = 1 << 20


def append(first: int, count: int = 1, *, group: int = 0, term: int = 1, nbytes: int = 1024) -> Envelope:
    """Entries `first` to `first + count`, or only the question whether what is before `first` is there."""
    span, batch = EntrySpan.of(first, []), None
    if count:
        payload = pa.py_buffer(bytes(nbytes))
        batch = entry_batch.build(group, first, term, [Proposal(EntryKind.WRITE, 1, payload)] * count)
        span = entry_batch.span(batch)
    message = Message(MessageKind.APPEND_ENTRIES, 1, 2, term, first - 1, min(first - 1, 1), entries=span)
    return Envelope(group, message, batch)


class Scene:
    """A queue of entries, and what a pump does with it."""

    def __init__(self, lane: Lane = Lane.LOG, **options: int) -> None:
        self.metrics = Metrics()
        self.clock = HandClock()
        made = TransportOptions(**options)  # type: ignore[arg-type]
        self.load = EnvelopeLoad(2, lane, Codec("c", 1, 64 * MIB), made, self.clock, self.metrics)

    def take(self) -> list[tuple[int, int]]:
        """Group and first index of what is taken next; empty for nothing. What was only a wake-up is passed over."""
        while not self.load.take(0.0):
            if self.load._queue.empty():
                return []
        return [(each.group, each.message.log_index + 1) for each in self.load._unsent]

    def rest(self) -> list[tuple[int, int]]:
        """The same of all that waits, which is written."""
        found = []
        while taken := self.take():
            found += taken
            self.load.written(0.0)
        return found


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_what_the_core_goes_back_behind_is_not_sent(scene: Scene) -> None:
    """It was refused, say: all that waits is sent again, and would otherwise come twice."""
    for first in range(1, 7):
        assert scene.load.put([append(first)])
    one = scene.load.queued_bytes // 6
    assert scene.load.put([append(3), append(4)])
    assert scene.load.queued_bytes == 2 * one
    assert scene.metrics.total("transport_messages_dropped") == 6
    assert scene.rest() == [(0, 3), (0, 4)]
    assert scene.load.empty
    assert scene.load.queued_bytes == 0


def test_a_window_that_is_sent_again_and_again_never_fills_the_queue() -> None:
    """A peer that refuses, or a way that is lost, again and again: each time the core sends its whole window. If that was queued behind
    what waits, and so dropped, the core would begin anew because of that: for ever, and nothing but the first of it would arrive.
    """
    scene = Scene(queue_bytes_max=64 * MIB)
    for begin in range(1, 9):
        window = [append(first, nbytes=4 * MIB) for first in range(begin, begin + 12)]
        assert scene.load.put(window[:1])
        assert scene.take() == [(0, begin)]
        scene.load.written(0.0)
        assert scene.load.put(window[1:])
        assert scene.load.queued_bytes <= 12 * 4 * MIB + 12 * 1024
    assert scene.rest() == [(0, first) for first in range(9, 20)]


def test_what_was_queued_at_once_and_goes_back_in_itself(scene: Scene) -> None:
    """A commit index that was held back for entries that are counted as lost meanwhile: the peer would refuse it, and what follows."""
    assert scene.load.put([append(31, 0), append(7), append(8)])
    assert scene.rest() == [(0, 7), (0, 8)]
    assert scene.metrics.total("transport_messages_dropped") == 1


def test_another_term_begins_anew(scene: Scene) -> None:
    assert scene.load.put([append(1), append(2)])
    assert scene.load.put([append(9, term=3)])
    assert scene.rest() == [(0, 9)]


def test_other_groups_keep_what_waits(scene: Scene) -> None:
    assert scene.load.put([append(1), append(1, group=7), append(2), append(2, group=7)])
    assert scene.load.put([append(1), append(3, group=7)])
    assert scene.rest() == [(7, 1), (7, 2), (0, 1), (7, 3)]


@pytest.mark.parametrize("count", [0, 1])
def test_what_follows_is_kept(scene: Scene, count: int) -> None:
    """A question that follows on the last entries goes back behind nothing."""
    assert scene.load.put([append(1), append(2)])
    assert scene.load.put([append(3, count)])
    assert scene.rest() == [(0, 1), (0, 2), (0, 3)]


def test_what_was_taken_is_sent_again_on_the_next_stream_unless_the_core_begins_anew(scene: Scene) -> None:
    """On the way that was given up, say, and is opened anew: the peer misses what was under way before it, and would refuse it."""
    assert scene.load.put([append(1), append(2)])
    assert scene.take() == [(0, 1), (0, 2)]
    assert scene.take() == [(0, 1), (0, 2)]
    scene.load.drop_waiting()
    assert scene.take() == []
    assert scene.load.empty
    assert scene.load.put([append(1)])
    assert scene.take() == [(0, 1)]
    assert scene.load.put([append(2)])
    assert scene.take() == [(0, 1)]
    assert scene.load.put([append(1)])
    assert scene.rest() == [(0, 1)]
    assert scene.load.queued_bytes == 0


def test_other_lanes_have_no_order_to_go_back_in() -> None:
    scene = Scene(Lane.CONTROL)
    beats = [Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, term, commit=4)) for term in (3, 2, 1)]
    for beat in beats:
        assert scene.load.put([beat])
    assert len(scene.rest()) == 3


def test_little_of_a_window_is_taken(scene: Scene) -> None:
    assert scene.load.put([append(first, nbytes=TAKEN_BYTES_MAX) for first in range(1, 17)])
    assert scene.take() == [(0, 1)]
    scene.load.drop_waiting()
    scene.load.written(0.0)
    assert scene.load.empty


def test_a_question_that_is_under_way_is_repeated_without_its_entries(scene: Scene) -> None:
    """A probe of some MiB takes longer on a slow line than the next sign of life of the peer, with each of which it is repeated."""
    probe = append(4, 3)
    assert scene.load.put([probe])
    assert scene.take() == [(0, 4)]
    # For it the stream is opened that it goes on.
    scene.load.accept()
    assert scene.take() == [(0, 4)]
    scene.load.written(0.0)
    for _ in range(3):
        assert scene.load.put([probe])
        assert scene.take() == [(0, 4)]
        (sent,) = scene.load._unsent
        assert sent.batch is None
        assert len(sent.message.entries or ()) == 0
        assert (sent.message.log_index, sent.message.log_term, sent.message.term) == (3, 1, 1)
        assert len(scene.load.packets(0)) == 1
        scene.load.written(0.0)
    # More than that, or less, or what another leadership asks, is another question.
    for other in (append(4, 4), append(4, 2), append(4, 3, term=2), append(4, 3, group=1), append(3, 3)):
        assert scene.load.put([other])
        assert scene.take() == [(other.group, other.message.log_index + 1)]
        assert scene.load._unsent[0].batch is not None
        scene.load.written(0.0)


@pytest.mark.parametrize("why", ["another stream", "time"])
def test_a_question_that_may_be_lost_is_repeated_as_it_was(scene: Scene, why: str) -> None:
    assert scene.load.put([append(4, 3)])
    assert scene.rest() == [(0, 4)]
    if why == "time":
        scene.clock.now += TransportOptions().silent_quick_s + 0.01
    else:
        scene.load.accept()
    assert scene.load.put([append(4, 3)])
    assert scene.take() == [(0, 4)]
    assert scene.load._unsent[0].batch is not None
