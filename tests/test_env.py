"""Time as the operating system tells it."""

from __future__ import annotations

import time

import pytest

from marble.env import SystemClock


def test_the_monotonic_clock_counts_the_time_that_the_machine_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine was suspended for an hour: Linux's monotonic clock does not know of it.
    clocks = {time.CLOCK_MONOTONIC: 100.0, time.CLOCK_BOOTTIME: 3700.0}
    monkeypatch.setattr(time, "clock_gettime", clocks.__getitem__)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    assert SystemClock().monotonic() == 3700.0
