"""From a history that cannot be explained to the few steps of it that already cannot be.

Rule 1: what is left is a proof about the whole. A step is only left out where an order of all steps would still be an
order without it: an observer always; an assignment only when none of the steps that are left could see it. So if the
rest has no order, neither has the whole. (Leaving out an assignment that is seen would make up a violation.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from marble.testing.linearize import Answer, Search, State, Step, visible_until

TRIES_MAX: Final = 400
"""How often the rest is searched again before what is left is good enough."""


def shrink(steps: Sequence[Step], initial: State, failed: int, explored_max: int) -> list[int]:
    """Numbers of few of `steps`, ascending by call, that have no order either.

    Parameters
    ----------
    steps, initial, explored_max
        As for `Search`.
    failed
        The step at whose return the search found none.
    """
    end = steps[failed].returned
    # What was called later has no part in it, and what returned later may as well never have.
    past = {
        number: step if step.returned is None or end is None or step.returned <= end else replace(step, returned=None)
        for number, step in enumerate(steps)
        if end is None or step.called <= end
    }
    tries = 0

    def has_no_order(numbers: Sequence[int]) -> bool:
        nonlocal tries
        tries += 1
        if tries > TRIES_MAX:
            return False
        return Search([past[number] for number in numbers], initial, explored_max).run().answer is Answer.VIOLATED

    left = sorted(past, key=lambda number: past[number].called)
    while True:
        observers = [number for number in left if not past[number].assigns]
        fewer = _without(left, observers, has_no_order)
        until = visible_until([past[number] for number in fewer])
        hidden = [
            number for place, number in enumerate(fewer) if past[number].assigns and until[place] < past[number].called
        ]
        fewer = _without(fewer, hidden, has_no_order)
        if len(fewer) == len(left):
            return left
        left = fewer


def _without(left: list[int], spare: list[int], has_no_order: Callable[[Sequence[int]], bool]) -> list[int]:
    """`left` without as many of `spare` as can go: first by large pieces, in the end one by one."""
    size = len(spare)
    while size:
        for start in range(0, len(spare), size):
            piece = set(spare[start : start + size])
            fewer = [number for number in left if number not in piece]
            if len(fewer) < len(left) and has_no_order(fewer):
                left = fewer
        here = set(left)
        spare = [number for number in spare if number in here]
        size = min(size // 2, len(spare))
    return left
