"""Whom a client asks next, and how long it waits for whom."""

from __future__ import annotations

from marble.contacts import FRESH_S, PROBE_TIMEOUT_S, SILENT_TIMEOUT_MAX_S, SILENT_TIMEOUT_MIN_S, Contacts


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_likely_leader_comes_first_and_the_silent_last() -> None:
    contacts = Contacts(["a:1", "b:1"])
    contacts.learn({"nodes": {"1": "a:1", "2": "b:1", "3": "c:1", "4": "d:1"}})
    assert contacts.candidates() == ["a:1", "b:1", "c:1", "d:1"]
    contacts.leader = "c:1"
    assert contacts.candidates() == ["c:1", "a:1", "b:1", "d:1"]
    contacts.fell_silent("c:1")
    assert contacts.leader is None
    contacts.refused("a:1")
    # Who answers that it cannot help is at least there.
    assert contacts.candidates() == ["b:1", "d:1", "a:1", "c:1"]
    contacts.answered("c:1")
    contacts.helped("a:1")
    assert contacts.candidates() == ["a:1", "b:1", "d:1", "c:1"]
    contacts.helped("c:1")
    assert contacts.candidates() == ["a:1", "b:1", "c:1", "d:1"]
    assert contacts.willing_first(["d:1", "a:1"]) == ["d:1", "a:1"]


def test_who_fell_silent_is_asked_briefly_and_then_more_patiently() -> None:
    contacts = Contacts(["a:1"])
    assert contacts.patience_s("a:1") == PROBE_TIMEOUT_S
    waits = []
    for _ in range(50):
        contacts.fell_silent("a:1")
        waits.append(contacts.patience_s("a:1"))
    assert waits[0] == SILENT_TIMEOUT_MIN_S
    assert waits == sorted(waits)
    assert waits[-1] == SILENT_TIMEOUT_MAX_S
    assert contacts.is_silent("a:1")
    contacts.answered("a:1")
    assert not contacts.is_silent("a:1")
    assert contacts.patience_s("a:1") == PROBE_TIMEOUT_S


def test_an_answer_is_fresh_for_a_while() -> None:
    clock = Clock()
    contacts = Contacts(["a:1"], clock)
    assert not contacts.is_fresh("a:1")
    contacts.answered("a:1")
    assert contacts.is_fresh("a:1")
    clock.now += FRESH_S
    assert not contacts.is_fresh("a:1")
    contacts.answered("a:1")
    contacts.refused("a:1")
    assert not contacts.is_fresh("a:1")
