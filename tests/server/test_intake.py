"""The server's end of a stream of writes: order of acks, bounds, the change of ways, the ends."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pyarrow as pa
import pytest

from marble.errors import (
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    SessionExpiredError,
    UnavailableError,
    UsageError,
)
from marble.transport import intake as intake_module
from marble.transport.intake import Intake, Relay, StreamEndedError, Ways
from marble.transport.wire import Ack, Stamp, decode_ack

WAIT_S = 30.0
"""A test that waits longer has failed."""


def _batch(number: int, rows: int = 1) -> pa.RecordBatch:
    return pa.record_batch({"n": pa.array([number] * rows, pa.int64())})


def _number(batch: pa.RecordBatch) -> int:
    return int(batch.column(0)[0].as_py())


class Place:
    """A log, or a leader: takes batches and answers when the test says so."""

    def __init__(self) -> None:
        self.taken: queue.Queue[tuple[int, Future[Ack]]] = queue.Queue()
        self.stamps: list[Stamp | None] = []
        self.aborted = threading.Event()
        self.closed = threading.Event()

    def write(self, batch: pa.RecordBatch, stamp: Stamp | None = None) -> Future[Ack]:
        future: Future[Ack] = Future()
        self.stamps.append(stamp)
        self.taken.put((_number(batch), future))
        return future

    def abort(self) -> None:
        self.aborted.set()

    def close(self, timeout_s: float) -> None:
        self.closed.set()

    def next(self) -> tuple[int, Future[Ack]]:
        return self.taken.get(timeout=WAIT_S)


class Bench:
    """An intake between a log, a leader elsewhere, and a client."""

    def __init__(self, *, leads: bool = True, forward: bool = True, timeout_s: float = WAIT_S) -> None:
        self.log, self.leader = Place(), Place()
        self.leads = leads
        self.acks: queue.Queue[Ack] = queue.Queue()
        self.gone = threading.Event()
        opener: Callable[[], Relay] | None = (lambda: self.leader) if forward else None
        self.intake = Intake(
            "t",
            Ways(lambda batch, stamp, begins: self.log.write(batch, stamp), lambda: self.leads, opener, timeout_s),
            self._answer,
        )

    def _answer(self, data: bytes) -> None:
        if self.gone.is_set():
            raise OSError("the client has gone")
        self.acks.put(decode_ack(data))

    def next_ack(self) -> Ack:
        return self.acks.get(timeout=WAIT_S)


def test_acks_leave_in_the_order_of_the_batches() -> None:
    bench = Bench()
    with bench.intake:
        for number in range(3):
            bench.intake.take(_batch(number))
        futures = [bench.log.next() for _ in range(3)]
        for number, future in reversed(futures):
            future.set_result(Ack(number + 1, 1, 1))
        assert [bench.next_ack().index for _ in range(3)] == [1, 2, 3]


def test_a_wrong_batch_is_answered_in_its_place_and_the_stream_goes_on() -> None:
    bench = Bench()

    def offer(batch: pa.RecordBatch, stamp: Stamp | None, begins: bool) -> Future[Ack]:
        if _number(batch) == 1:
            raise UsageError("wrong")
        return bench.log.write(batch)

    bench.intake = Intake("t", Ways(offer, lambda: True, None, WAIT_S), bench._answer)
    with bench.intake:
        for number in range(3):
            bench.intake.take(_batch(number))
        bench.intake.refuse(UsageError("no rows"))
        for _ in range(2):
            number, future = bench.log.next()
            future.set_result(Ack(number + 1, 1, 1))
        answers = [bench.next_ack() for _ in range(4)]
    assert [ack.error_code for ack in answers] == [None, "usage", None, "usage"]
    assert [ack.message for ack in answers] == ["", "wrong", "", "no rows"]


@pytest.mark.parametrize(
    ("batches_max", "bytes_max"), [(2, 2**30), (10, 2 * _batch(0).nbytes)], ids=["by count", "by bytes"]
)
def test_no_more_is_taken_than_the_window_holds(
    monkeypatch: pytest.MonkeyPatch, batches_max: int, bytes_max: int
) -> None:
    monkeypatch.setattr(intake_module, "UNDER_WAY_BATCHES_MAX", batches_max)
    monkeypatch.setattr(intake_module, "UNDER_WAY_BYTES_MAX", bytes_max)
    bench = Bench()
    third_taken = threading.Event()
    with bench.intake:
        bench.intake.take(_batch(0))
        bench.intake.take(_batch(1))

        def take_third() -> None:
            bench.intake.take(_batch(2))
            third_taken.set()

        thread = threading.Thread(target=take_third)
        thread.start()
        first, second = bench.log.next()[1], bench.log.next()[1]
        assert bench.log.taken.empty()
        assert not third_taken.is_set()
        # Room comes with the oldest: an answer to the second alone frees nothing.
        second.set_result(Ack(2, 1, 1))
        assert not third_taken.is_set()
        first.set_result(Ack(1, 1, 1))
        assert third_taken.wait(WAIT_S)
        thread.join(WAIT_S)
        bench.log.next()[1].set_result(Ack(3, 1, 1))
    assert [bench.next_ack().index for _ in range(3)] == [1, 2, 3]


def test_a_batch_above_the_window_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "UNDER_WAY_BYTES_MAX", 8)
    bench = Bench()
    with bench.intake:
        bench.intake.take(_batch(0, rows=100))
        bench.log.next()[1].set_result(Ack(1, 1, 100))
    assert bench.next_ack().value == 100


def test_a_follower_sends_everything_to_the_leader() -> None:
    bench = Bench(leads=False)
    with bench.intake:
        bench.intake.take(_batch(0))
        bench.intake.take(_batch(1))
        for index in (1, 2):
            bench.leader.next()[1].set_result(Ack(index, 1, 1))
        assert [bench.next_ack().index, bench.next_ack().index] == [1, 2]
    assert bench.log.taken.empty()
    assert bench.leader.closed.is_set()
    assert not bench.leader.aborted.is_set()


def test_a_follower_that_must_not_forward_says_who_leads() -> None:
    bench = Bench(leads=False, forward=False)
    with bench.intake:
        bench.intake.take(_batch(0))
        bench.log.next()[1].set_exception(NotLeaderError("not me", "h:1"))
        ack = bench.next_ack()
    assert (ack.error_code, ack.leader) == ("not_leader", "h:1")


def test_a_node_that_begins_to_lead_takes_over_once_nothing_is_under_way() -> None:
    bench = Bench(leads=False)
    with bench.intake:
        bench.intake.take(_batch(0))
        bench.leads = True
        bench.intake.take(_batch(1))
        bench.leader.next()[1].set_result(Ack(1, 1, 1))
        number, future = bench.leader.next()
        assert number == 1  # The first was still under way: the second must not take the other road.
        future.set_result(Ack(2, 1, 1))
        bench.next_ack(), bench.next_ack()
        _wait_until_idle(bench.intake)
        bench.intake.take(_batch(2))
        number, future = bench.log.next()
        assert number == 2
        future.set_result(Ack(3, 1, 1))


@pytest.mark.parametrize("refusal", [NotLeaderError("moved", "h:1"), UnavailableError("another leader took over")])
def test_what_a_lost_leadership_refused_goes_to_the_new_leader_in_order(refusal: MarbleError) -> None:
    bench = Bench()
    with bench.intake:
        for number in range(3):
            bench.intake.take(_batch(number))
        futures = [bench.log.next()[1] for _ in range(3)]
        futures[0].set_result(Ack(1, 1, 1))
        bench.leads = False
        futures[1].set_exception(refusal)
        futures[2].set_exception(NotLeaderError("moved", "h:1"))
        for number in (1, 2):
            sent, future = bench.leader.next()
            assert sent == number
            future.set_result(Ack(number + 1, 2, 1))
        answers = [bench.next_ack() for _ in range(3)]
    assert [(ack.index, ack.term, ack.error_code) for ack in answers] == [(1, 1, None), (2, 2, None), (3, 2, None)]


@pytest.mark.parametrize("later", [None, OutcomeUnknownError("who knows")])
def test_a_refused_batch_never_overtakes_a_later_one_that_may_have_taken_effect(later: MarbleError | None) -> None:
    bench = Bench()
    with bench.intake:
        for number in range(3):
            bench.intake.take(_batch(number))
        futures = [bench.log.next()[1] for _ in range(3)]
        bench.leads = False
        futures[0].set_exception(NotLeaderError("moved", "h:1"))
        if later is None:
            futures[1].set_result(Ack(2, 1, 1))
        else:
            futures[1].set_exception(later)
        futures[2].set_exception(NotLeaderError("moved", "h:1"))
        # Nothing after the third may have taken effect: it alone could be sent again, once it is its turn.
        first, second = bench.next_ack(), bench.next_ack()
        sent, future = bench.leader.next()
        assert sent == 2
        future.set_result(Ack(3, 2, 1))
        third = bench.next_ack()
    assert first.error_code == "not_leader"
    assert second.error_code == (None if later is None else "outcome_unknown")
    assert third.index == 3


def test_stop_answers_what_is_under_way_and_takes_no_more() -> None:
    bench = Bench(leads=False)
    with bench.intake:
        bench.intake.take(_batch(0))
        bench.leader.next()
        bench.intake.stop()
        assert bench.leader.aborted.is_set()
        assert bench.next_ack().error_code == "outcome_unknown"
        bench.intake.take(_batch(1))
        pytest.fail("a stopped intake must not take batches")
    with pytest.raises(StreamEndedError):
        bench.intake.take(_batch(2))


def test_an_outcome_that_never_comes_ends_at_its_deadline() -> None:
    bench = Bench(timeout_s=0.05)
    with bench.intake:
        bench.intake.take(_batch(0))
        assert bench.next_ack().error_code == "outcome_unknown"


def test_a_stamped_batch_does_not_wait_for_a_node_that_has_ceased_to_lead() -> None:
    """Its client may ask the new leader under the same stamp, and the deadline is far away."""
    bench = Bench(timeout_s=100 * WAIT_S)
    with bench.intake:
        bench.intake.take(_batch(0), Stamp(3, 1))
        bench.intake.take(_batch(1), Stamp(3, 2))
        (_, first), _ = bench.log.next(), bench.log.next()
        bench.leads = False
        assert isinstance(bench.next_ack().error(), OutcomeUnknownError)
        assert isinstance(bench.next_ack().error(), UnavailableError | OutcomeUnknownError)
        # It is decided all the same, and nobody is told twice.
        first.set_result(Ack(1, 1, 1))
    assert bench.acks.empty()


def test_what_cannot_be_sent_again_waits_although_the_node_has_ceased_to_lead() -> None:
    patient, other = Bench(forward=False), Bench(forward=False)
    with patient.intake, other.intake:
        patient.intake.take(_batch(0))
        _, future = patient.log.next()
        patient.leads = other.leads = False
        other.intake.take(_batch(1), Stamp(3, 1))
        # The other began to wait later, so by now the patient one has waited long enough to show that it does.
        assert isinstance(other.next_ack().error(), OutcomeUnknownError)
        assert patient.acks.empty()
        future.set_result(Ack(7, 1, 1))
        assert patient.next_ack().index == 7


def test_a_client_that_goes_ends_the_stream() -> None:
    bench = Bench(leads=False)
    with bench.intake:
        bench.intake.take(_batch(0))
        bench.gone.set()
        bench.leader.next()[1].set_result(Ack(1, 1, 1))
        _wait_until_broken(bench.intake)
        with pytest.raises(StreamEndedError):
            bench.intake.take(_batch(1))
    assert bench.leader.closed.is_set()


def test_a_broken_stream_leaves_no_thread_behind() -> None:
    bench = Bench(leads=False)

    def handle() -> None:
        with bench.intake:
            bench.intake.take(_batch(0))
            bench.leader.next()
            raise pa.ArrowInvalid("the client sent garbage")

    with pytest.raises(pa.ArrowInvalid):
        handle()
    assert bench.leader.aborted.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "marble-ack-t"]


def _wait_until_idle(intake: Intake) -> None:
    """An ack is written before its batch leaves the window."""
    with intake._state:
        assert intake._state.wait_for(lambda: not intake._window, WAIT_S)


def _wait_until_broken(intake: Intake) -> None:
    with intake._state:
        assert intake._state.wait_for(lambda: intake._broken, WAIT_S)


def test_a_refusal_holds_for_all_that_follows_in_the_stream() -> None:
    offered: list[int] = []
    pending: Future[Ack] = Future()

    def offer(batch: pa.RecordBatch, stamp: Stamp | None, begins: bool) -> Future[Ack]:
        offered.append(batch["k"][0].as_py())
        if len(offered) == 1:
            return pending
        if len(offered) == 2:
            raise UnavailableError("full")
        done: Future[Ack] = Future()
        done.set_result(Ack(index=9, term=1))
        return done

    answers: queue.Queue[dict] = queue.Queue()
    intake = Intake("t", Ways(offer, lambda: True, None, WAIT_S), lambda data: answers.put(json.loads(data)))
    with intake:
        for key in (1, 2, 3):
            intake.take(pa.record_batch({"k": [key]}))
        # The third was never offered: taking it would have passed the second.
        assert offered == [1, 2]
        pending.set_result(Ack(index=5, term=1))
        assert answers.get(timeout=WAIT_S)["index"] == 5
        assert [answers.get(timeout=WAIT_S)["error"] for _ in range(2)] == ["unavailable", "unavailable"]
        # The client sent this before it heard of the refusal.
        with intake._state:
            assert intake._state.wait_for(lambda: not intake._window, WAIT_S)
        intake.take(pa.record_batch({"k": [4]}))
        assert answers.get(timeout=WAIT_S)["error"] == "unavailable"
    assert offered == [1, 2]


def test_stamps_go_with_their_batches_to_the_log_and_to_the_leader() -> None:
    for leads in (True, False):
        bench = Bench(leads=leads)
        place = bench.log if leads else bench.leader
        with bench.intake:
            bench.intake.take(_batch(0), Stamp(7, 1))
            bench.intake.take(_batch(1))
            for index in (1, 2):
                place.next()[1].set_result(Ack(index, 1, 1))
            bench.next_ack(), bench.next_ack()
        assert place.stamps == [Stamp(7, 1), None]


def test_a_refused_batch_keeps_its_stamp_on_its_way_to_the_new_leader() -> None:
    bench = Bench()
    with bench.intake:
        bench.intake.take(_batch(0), Stamp(7, 1))
        bench.leads = False
        bench.log.next()[1].set_exception(NotLeaderError("moved", "h:1"))
        bench.leader.next()[1].set_result(Ack(1, 2, 1))
        assert bench.next_ack().index == 1
    assert bench.leader.stamps == [Stamp(7, 1)]


@pytest.mark.parametrize("stamped", [True, False])
def test_after_a_stamped_batch_whose_outcome_is_not_known_nothing_is_taken(stamped: bool) -> None:
    bench = Bench()
    with bench.intake:
        bench.intake.take(_batch(0), Stamp(7, 1) if stamped else None)
        bench.log.next()[1].set_exception(OutcomeUnknownError("not decided in time"))
        assert bench.next_ack().error_code == "outcome_unknown"
        bench.intake.take(_batch(1), Stamp(7, 2) if stamped else None)
        if stamped:
            # Its client sends both again, in order; were this one taken, the first would come after it.
            assert bench.next_ack().error_code == "unavailable"
            assert bench.log.taken.empty()
        else:
            bench.log.next()[1].set_result(Ack(2, 1, 1))
            assert bench.next_ack().index == 2


def test_a_session_that_expired_refuses_its_own_batches_only() -> None:
    bench = Bench()
    with bench.intake:
        bench.intake.take(_batch(0), Stamp(7, 1))
        bench.log.next()[1].set_exception(SessionExpiredError("not known"))
        assert bench.next_ack().error_code == "session_expired"
        bench.intake.take(_batch(1), Stamp(9, 1))
        bench.log.next()[1].set_result(Ack(2, 1, 1))
        assert bench.next_ack().index == 2
