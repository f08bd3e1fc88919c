"""The pace of files beside the log: measured in quiet times, none when writers would be refused."""

from __future__ import annotations

import threading

import pytest

from marble.errors import UnavailableError
from marble.pacing import UNBRIDLED, UNHURRIED, Pacer


@pytest.mark.parametrize(
    ("pressure", "part"),
    [(0.0, 1.0), (UNHURRIED, 1.0), ((UNHURRIED + UNBRIDLED) / 2, 0.5), (UNBRIDLED, 0.0), (1.0, 0.0), (7.0, 0.0)],
)
def test_pauses_shrink_as_more_waits(pressure: float, part: float) -> None:
    pacer = Pacer(1000, lambda: pressure, threading.Event())
    assert pacer.pause_s(500) == pytest.approx(0.5 * part)


def test_a_node_that_stops_ends_the_waiting() -> None:
    stopped = threading.Event()
    pacer = Pacer(1, lambda: 0.0, stopped)
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(UnavailableError, match="the node stops"):
            pacer(1_000_000)
        ended.set()

    thread = threading.Thread(target=wait, name="test-pacer")
    thread.start()
    stopped.set()
    assert ended.wait(30)
    thread.join(30)


def test_nobody_waits_when_much_waits_to_be_written() -> None:
    Pacer(1, lambda: 1.0, threading.Event())(1 << 40)
