"""Virtual time: what will happen, in order of when, and the line of it that a person reads when something broke.

Rule 1: one seed gives one history. Events of one moment happen in the order in which they were planned; nothing depends on a clock, a
        thread, an address in memory, or the order of a set.
Rule 2: one event is one step. A step costs some tens of microseconds of a core, so this file does as little as it can for each.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from heapq import heapify, heappop, heappush
from random import Random
from typing import Any, Final

TRANSCRIPT_LINES: Final = 60
"""How much of a history's end is kept for who has to understand a failure."""

SECOND: Final = 1_000_000
"""Virtual time is in whole microseconds."""


class Loop:
    """Events on virtual time, and the one source of chance of a history.

    Attributes
    ----------
    now
        Microseconds since the history began.
    steps
        Events that have happened.
    random
        Whoever is simulated draws from here, and nowhere else.
    """

    __slots__ = ("_heap", "_lines", "_order", "_whole", "now", "random", "steps")

    def __init__(self, seed: int, *, record: bool = False) -> None:
        self.now = 0
        self.steps = 0
        self.random = Random(seed)
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._lines: deque[tuple[int, int, str, tuple[Any, ...]]] = deque(maxlen=TRANSCRIPT_LINES)
        self._whole: list[str] | None = [] if record else None

    def after(self, delay_us: int, action: Callable[..., None], *arguments: Any) -> None:
        """Let `action` happen `delay_us` from now."""
        self._order += 1
        heappush(self._heap, (self.now + delay_us, self._order, action, arguments))

    def hasten(self, moments: Collection[int], actions: Sequence[Callable[..., None]]) -> None:
        """Let what was to happen of `actions` at one of these later `moments` happen now, in its order."""
        self._heap = [
            (min(at, self.now), order, action, arguments)
            if at in moments and action in actions
            else (at, order, action, arguments)
            for at, order, action, arguments in self._heap
        ]
        heapify(self._heap)

    def step(self) -> bool:
        """Let the next event happen. False if there is none."""
        if not self._heap:
            return False
        self.now, _, action, arguments = heappop(self._heap)
        self.steps += 1
        action(*arguments)
        return True

    def chance(self, probability: float) -> bool:
        """Draw: True in `probability` of all cases. Costs no draw where it is certain not to be."""
        return probability > 0 and self.random.random() < probability

    def between(self, low: int, high: int) -> int:
        """Draw a whole number in ``[low, high]``."""
        return low + int(self.random.random() * (high - low + 1))

    def note(self, node: int, text: str, *parts: Any) -> None:
        """Write a line of the transcript; `parts` fill the places of `text` only when somebody reads it."""
        if self._whole is None:
            self._lines.append((self.now, node, text, parts))
        else:
            self._whole.append(_line(self.now, node, text, parts))

    def transcript(self) -> list[str]:
        """The last lines, or all of them if the loop records."""
        return [_line(*line) for line in self._lines] if self._whole is None else list(self._whole)

    def digest(self) -> str:
        """Names the whole transcript of a loop that records."""
        return hashlib.sha256("\n".join(self.transcript()).encode()).hexdigest()


def _line(now: int, node: int, text: str, parts: tuple[Any, ...]) -> str:
    who = f"node {node}" if node else "     -"
    return f"{now / SECOND:11.6f} {who}  {text.format(*parts)}"
