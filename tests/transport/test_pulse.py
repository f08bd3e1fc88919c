"""Whether a peer answers, measured on made-up clocks."""

from __future__ import annotations

import math

import pytest

from marble.transport.pulse import LATEST, UNANSWERED_MAX, Pulse


def test_nothing_is_due_before_a_stream_and_after_it() -> None:
    pulse = Pulse(0.1, 0.2)
    assert pulse.due_in(5.0) is None
    pulse.sent(5.0)
    assert pulse.waited_s(9.0) == 0.0
    pulse.begin(10.0)
    assert pulse.due_in(10.0) == 0.0
    pulse.sent(10.0)
    assert pulse.due_in(10.03) == pytest.approx(0.07)
    assert pulse.waited_s(10.5) == pytest.approx(0.5)
    pulse.end()
    assert pulse.due_in(11.0) is None
    assert pulse.waited_s(11.0) == 0.0
    assert pulse.answered(11.0) is None


def test_answers_belong_to_the_oldest_question() -> None:
    pulse = Pulse(0.1, 0.2)
    pulse.begin(0.0)
    pulse.sent(0.0)
    pulse.sent(0.1)
    assert pulse.answered(0.25) == pytest.approx(0.25)
    assert pulse.waited_s(0.3) == pytest.approx(0.2)
    assert pulse.answered(0.35) == pytest.approx(0.25)
    assert pulse.answered(0.36) is None
    assert pulse.round_trip_s == pytest.approx(0.25)


def test_questions_without_answers_come_to_an_end() -> None:
    pulse = Pulse(0.1, 0.2)
    pulse.begin(0.0)
    for at in range(UNANSWERED_MAX):
        assert pulse.due_in(at * 0.1) == pytest.approx(0.0)
        pulse.sent(at * 0.1)
    assert pulse.due_in(100.0) == pytest.approx(0.1)
    pulse.answered(100.0)
    assert pulse.due_in(100.0) == 0.0


def test_a_long_way_is_no_dead_one() -> None:
    pulse = Pulse(0.1, 0.2)
    pulse.begin(0.0)
    for at in range(10):
        pulse.sent(float(at))
        assert not pulse.late(at + 0.19)
        pulse.answered(at + 0.5)
    # It is used to half a second by now, so 0.45 s are nothing.
    pulse.sent(20.0)
    assert not pulse.late(20.45)
    assert pulse.late(21.5)
    # A new stream on the same way begins with what is known of it.
    pulse.begin(30.0)
    pulse.sent(30.0)
    assert not pulse.late(30.45)


def test_a_short_way_has_its_patience() -> None:
    pulse = Pulse(0.1, 0.2)
    pulse.begin(0.0)
    pulse.sent(0.0)
    assert not pulse.late(0.2)
    assert pulse.late(0.21)
    pulse.answered(0.001)
    for at in range(1, 20):
        pulse.sent(float(at))
        pulse.answered(at + 0.001)
    pulse.sent(50.0)
    assert not pulse.late(50.19)
    assert pulse.late(50.21)


def test_what_is_overdue_is_much_later_than_usual() -> None:
    pulse = Pulse(0.1, 0.2)
    pulse.begin(0.0)
    pulse.sent(0.0)
    assert not pulse.overdue(0.9, 1.0, 5.0)
    assert pulse.overdue(1.1, 1.0, 5.0)
    pulse.answered(0.001)
    for at in range(1, 20):
        pulse.sent(float(at))
        pulse.answered(at + 0.5)
    # Half a second is usual by now: two of them are not much.
    pulse.sent(50.0)
    assert not pulse.overdue(51.5, 1.0, 5.0)
    assert pulse.overdue(54.0, 1.0, 5.0)
    # There is an end to patience.
    assert pulse.overdue(51.5, 1.0, 1.4)


def test_what_tcp_sent_again_is_not_what_the_way_takes() -> None:
    pulse = Pulse(0.1, 0.2)
    pulse.begin(0.0)
    for at in range(LATEST):
        assert pulse.least_s == 0.0
        pulse.sent(float(at))
        pulse.answered(at + (0.002 if at == 3 else 0.9))
    assert pulse.least_s == pytest.approx(0.002)
    for at in range(10, 10 + LATEST):
        pulse.sent(float(at))
        pulse.answered(at + 0.3)
    assert pulse.least_s == pytest.approx(0.3)


def test_late_with_a_proof_is_what_was_asked_before_it() -> None:
    pulse = Pulse(1.0, 0.1)
    assert pulse.proved_at == -math.inf
    pulse.begin(0.0)
    pulse.sent(1.0)
    assert pulse.late(2.0)
    assert pulse.late(2.0, 1.5)
    assert not pulse.late(2.0, 1.0)
    assert not pulse.late(2.0, pulse.proved_at)
    pulse.answered(2.0)
    assert pulse.proved_at == 1.0
    pulse.end()
    pulse.begin(3.0)
    assert pulse.proved_at == 1.0
