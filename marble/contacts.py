"""Whom a client asks, and how long it waits for whom: nodes that it was given, those that they named, and who of them fell silent.

Rule 1: a node that does not answer costs a moment once. It is asked last from then on, and briefly; more patiently each time, since it may
only be busy. Its first answer ends that.
Rule 2: whether somebody is there is found out by a question that is answered at once (``ping``), not by one that may take its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

PROBE_TIMEOUT_S: Final = 1.0
"""How long a node may take to answer that it is there, or who leads, before the next one is asked."""

SILENT_TIMEOUT_MIN_S: Final = 0.25
SILENT_TIMEOUT_MAX_S: Final = 2.0
"""The same of one that did not answer the last time; doubling with each time."""

FRESH_S: Final = 1.0
"""Who answered so long ago is taken to be there."""


class Contacts:
    """The nodes that one client knows.

    - ``leader`` is a guess: every use may find it wrong.
    - ``given`` are the user's endpoints; what asks one replica about itself stays with them. ``learnt`` are the others that nodes named.
    - ``_silent`` has those that did not answer, with how many times in a row; ``_unwilling`` those that last answered that they cannot.
      All are hints: threads may overtake one another here, at the cost of a question.

    Parameters
    ----------
    given
        ``host:port`` of some or all nodes.
    clock
        Monotonic seconds.
    """

    def __init__(self, given: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.given = tuple(given)
        self.learnt: tuple[str, ...] = ()
        self.leader: str | None = None
        self._clock = clock
        self._silent: dict[str, int] = {}
        self._unwilling: set[str] = set()
        self._heard: dict[str, float] = {}

    def candidates(self) -> list[str]:
        """All known nodes, the likely leader first, those last that did not answer."""
        leader = self.leader
        others = [each for each in (*self.given, *self.learnt) if each != leader]
        return self.willing_first(others if leader is None else [leader, *others])

    def willing_first(self, endpoints: Sequence[str]) -> list[str]:
        """These, those last that did not answer or could not help."""
        return sorted(endpoints, key=lambda each: (each in self._silent, each in self._unwilling))

    def learn(self, status: Mapping[str, Any]) -> None:
        """A node has said which nodes there are."""
        self.learnt = tuple(each for each in status["nodes"].values() if each not in self.given)

    def answered(self, endpoint: str) -> None:
        """It is there."""
        self._heard[endpoint] = self._clock()
        self._silent.pop(endpoint, None)

    def helped(self, endpoint: str) -> None:
        """It did what was asked of it."""
        self.answered(endpoint)
        self._unwilling.discard(endpoint)

    def refused(self, endpoint: str) -> None:
        """It could not do what was asked of it, or did not in time."""
        self._unwilling.add(endpoint)
        self._heard.pop(endpoint, None)
        if self.leader == endpoint:
            self.leader = None

    def fell_silent(self, endpoint: str) -> None:
        """It does not answer."""
        self._silent[endpoint] = self._silent.get(endpoint, 0) + 1
        self.refused(endpoint)

    def is_silent(self, endpoint: str) -> bool:
        """Whether it did not answer the last time."""
        return endpoint in self._silent

    def is_fresh(self, endpoint: str) -> bool:
        """Whether it answered a moment ago."""
        return self._clock() - self._heard.get(endpoint, -FRESH_S) < FRESH_S

    def patience_s(self, endpoint: str) -> float:
        """How long it may take to say that it is there."""
        times = min(self._silent.get(endpoint, 0), 16)
        if not times:
            return PROBE_TIMEOUT_S
        return min(math.ldexp(SILENT_TIMEOUT_MIN_S, times - 1), SILENT_TIMEOUT_MAX_S)
