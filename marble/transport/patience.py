"""How much a client's stream of writes has under way, and for how long it waits for what."""

from __future__ import annotations

from typing import Final

IN_FLIGHT_BATCHES_MAX: Final = 1024
"""Writes of one stream that wait for their answer; a further `write` waits for room."""

IN_FLIGHT_BYTES_MAX: Final = 64 * 1024 * 1024
"""The same in bytes of Arrow buffers; a single larger batch is let through alone."""

REFUSED_PAUSE_MIN_S: Final = 0.01
REFUSED_PAUSE_MAX_S: Final = 0.5
"""Before what was refused, or could not be sent, is sent again; doubling while that goes on."""

GATHER_AFTER: Final = 3
"""A stream that owes so many answers gathers what else is written until one comes."""

SILENCE_MAX_S: Final = 8.0
"""A stream with a session that owes answers and gives none for so long is given up, and its writes go to whoever leads then."""

PROBE_AFTER_S: Final = 1.0
"""Who owes an answer for so long is asked whether it is there, and again after so long."""

SLOW_BYTES_PER_S: Final = 256 * 1024
"""What was written may take so long to arrive before its answer counts as owed: the question would wait behind it."""


def longer(pause_s: float) -> float:
    """The pause after one of `pause_s` that was for nothing."""
    return min(max(2 * pause_s, REFUSED_PAUSE_MIN_S), REFUSED_PAUSE_MAX_S)
