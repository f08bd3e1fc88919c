"""How much a way has under way: as much as fills its line, whatever that is like, and not much more."""

from __future__ import annotations

from collections import deque

import pytest
from transport.test_spreading import PATIENCE_S, Net

from marble.transport.parts import PART_BYTES, Kind, Notice
from marble.transport.spreading import Part


@pytest.mark.parametrize(
    ("delay_s", "bytes_per_s"), [(0.0, 8e6), (0.075, 8e6), (0.1, 1e6), (0.002, 200e6), (0.1, 60e6)]
)
def test_window_fills_a_line_and_not_much_more(delay_s: float, bytes_per_s: float) -> None:
    """A line of its own rate and length on way 1; payloads end in a part of a few bytes, which is answered much sooner than others."""
    net = Net()
    net.up(1)
    step_s, run_s = 0.001, 12.0
    line: deque[tuple[float, Part]] = deque()
    free_at, arrived, most_waiting_s = net.clock.now, 0, 0.0
    end = net.clock.now + run_s
    while net.clock.now < end:
        now = net.clock.now
        while net.put(2 * PART_BYTES + 64):
            pass
        while (part := net.spreader.next(1, 0.0, lambda: False)) is not None:
            free_at = max(free_at, now) + part.body.size / bytes_per_s
            line.append((free_at + delay_s, part))
        if now > end - run_s / 2:
            most_waiting_s = max(most_waiting_s, free_at - now)
        while line and line[0][0] <= now:
            _, part = line.popleft()
            arrived += part.body.size if now > end - run_s / 2 else 0
            net.assembly.put(part.number, part.offset, part.total, part.body)
            net.spreader.arrived(1, Notice(Kind.ARRIVED, part.flow, part.number, part.offset, part.total))
        while net.take():
            pass
        net.clock.now += step_s
        net.watch()
    assert arrived > 0.9 * bytes_per_s * run_s / 2
    assert most_waiting_s < max(8 * PART_BYTES / bytes_per_s, 4 * PATIENCE_S)
