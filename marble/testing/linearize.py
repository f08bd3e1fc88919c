"""The search of the linearizability checker: is there an order of these steps that explains what they saw?

The algorithm is Wing and Gong's ("Testing and Verifying Concurrent Objects", 1993) in Lowe's form ("Testing for
Linearizability", 2017): go through the calls and returns in order of time with the set of all configurations that
agree with what happened so far, and make a step take effect just in time, when some return demands it. When a return
leaves no configuration, no order exists.

Rule 1: a step is a guarded assignment (`Step`): it takes effect at one moment between its call and its return, its
guards hold just before, its assignments just after. That is all that registers and tables need, and it is what makes
the following sound, each of which takes an exponent out of the search:

1. *Observers go at once.* A step that assigns nothing may take effect as soon as its guards hold: nothing is lost.
2. *What is never seen is one value.* Values that no guard asks for are interned as one, `UNSEEN`.
3. *An assignment that nobody sees hides behind the next.* A step without guards whose values are never seen may take
   effect just before any step that blindly assigns at least the same slots.
4. *A step without a return is never forced.* It may take effect once, at any time after its call, or never. It is
   dropped if nobody can see it, and from the moment when the last step that could see it has returned.

So a configuration is (which pending writers took effect, state, debt): the debt is the set of observers and unseen
writers that still have to take effect (1, 3), and of steps without a return that are used up (4). Of two
configurations that differ only in their debt, the one whose debt is part of the other's can do all that the other can,
and the other is forgotten.

Rule 2: no clock and no chance: the bound is a count of configurations, so one history always gets one verdict.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

State = tuple[int, ...]
"""One interned value per slot."""

Pairs = tuple[tuple[int, int], ...]
"""(slot, interned value), each slot at most once."""

UNSEEN: Final = 0
"""The value that stands for all that no guard asks for."""


class Answer(enum.Enum):
    """What a search, or a check of a whole history, came to."""

    LINEARIZABLE = "linearizable"
    VIOLATED = "violated"
    UNDECIDED = "undecided"
    """The bound was reached before an answer was. Neither good nor bad is shown."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation as the search sees it.

    - ``called < returned``, in any unit that orders all calls and returns of the history; None: it never returned.
      Two steps are ordered by time exactly if one returned at a smaller number than the other was called at.
    - ``expects``: slots that must hold these values; ``differs``: slots that must not; ``assigns``: slots that hold
      these values after it.
    """

    called: int
    returned: int | None
    expects: Pairs = ()
    differs: Pairs = ()
    assigns: Pairs = ()

    @property
    def blind(self) -> bool:
        """Whether it takes effect whatever the state is."""
        return not self.expects and not self.differs

    def allowed(self, state: State) -> bool:
        """Whether its guards hold in `state`."""
        return all(state[slot] == value for slot, value in self.expects) and all(
            state[slot] != value for slot, value in self.differs
        )

    def after(self, state: State) -> State:
        """The state that it leaves behind `state`."""
        values = list(state)
        for slot, value in self.assigns:
            values[slot] = value
        return tuple(values)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found.

    Attributes
    ----------
    answer
        Whether an order exists.
    failed
        If VIOLATED: which step's return left no configuration. If UNDECIDED: at whose return the search gave up.
    states
        If VIOLATED: the states that were possible just before that return, ascending.
    explored
        Configurations looked at.
    """

    answer: Answer
    failed: int | None
    states: tuple[State, ...]
    explored: int


def visible_until(steps: Sequence[Step]) -> list[float]:
    """Until when some step may see what each step assigned: the last return of one that could; -inf if there is none.

    A step that never returns and that nobody sees is left out of the search, and then sees nothing itself; so this
    repeats until nothing more falls out.
    """
    gone: set[int] = set()
    while True:
        seers: dict[tuple[int, int], list[int]] = {}
        deniers: dict[int, list[int]] = {}
        for number, step in enumerate(steps):
            if number not in gone:
                for pair in step.expects:
                    seers.setdefault(pair, []).append(number)
                for slot, _ in step.differs:
                    deniers.setdefault(slot, []).append(number)
        until = [
            max((_end(steps[other]) for other in _who_sees(number, steps, seers, deniers)), default=-float("inf"))
            for number, step in enumerate(steps)
        ]
        more = {n for n, step in enumerate(steps) if n not in gone and step.returned is None and until[n] < step.called}
        if not more:
            return until
        gone |= more


def _end(step: Step) -> float:
    return float("inf") if step.returned is None else step.returned


def _who_sees(
    number: int, steps: Sequence[Step], seers: dict[tuple[int, int], list[int]], deniers: dict[int, list[int]]
) -> list[int]:
    """Steps other than `number` that could take effect after it and whose guards depend on what it assigned."""
    step = steps[number]
    found = [other for pair in step.assigns for other in seers.get(pair, ())]
    found += [other for slot, _ in step.assigns for other in deniers.get(slot, ())]
    return [other for other in found if other != number and _end(steps[other]) >= step.called]


class _Frontier:
    """Configurations that agree with all returns so far: (writers done, state) -> debts, none part of another."""

    __slots__ = ("debts",)

    def __init__(self) -> None:
        self.debts: dict[tuple[int, State], list[int]] = {}

    def add(self, done: int, state: State, debt: int) -> bool:
        """False if a configuration that can do at least as much is here already."""
        known = self.debts.get((done, state))
        if known is None:
            self.debts[done, state] = [debt]
            return True
        for other in known:
            if other & debt == other:
                return False
        known[:] = [other for other in known if other & debt != debt]
        known.append(debt)
        return True


class Search:
    """One search over the steps of one partition.

    Parameters
    ----------
    steps
        The steps, in any order.
    initial
        The state before the first.
    explored_max
        How many configurations may be looked at before the answer is UNDECIDED.
    """

    def __init__(self, steps: Sequence[Step], initial: State, explored_max: int) -> None:
        self._steps = steps
        self._explored = 0
        self._explored_max = explored_max
        self._until = visible_until(steps)
        # Steps that do the same have the same number here.
        kinds: dict[tuple[Pairs, Pairs, Pairs], int] = {}
        self._kinds = [kinds.setdefault((step.expects, step.differs, step.assigns), len(kinds)) for step in steps]
        self._frontier = _Frontier()
        self._frontier.add(0, initial, 0)
        # Every pending step has a bit, which is free again when the step is over.
        self._bits: dict[int, int] = {}
        self._free: list[int] = []
        self._bits_used = 0
        # The pending steps, by what may be done with them.
        self._observers: dict[int, int] = {}
        self._unseen: dict[int, int] = {}
        self._writers: dict[int, int] = {}
        self._open: dict[int, int] = {}

    def run(self) -> Outcome:
        """Go through all calls and returns."""
        steps = self._steps
        events: list[tuple[float, int, int]] = []
        for number, step in enumerate(steps):
            until = self._until[number]
            if not step.assigns and (step.returned is None or step.blind):
                continue
            if step.returned is not None:
                events += [(step.called, 0, number), (step.returned, 1, number)]
            elif until >= step.called:
                events.append((step.called, 0, number))
                if until != float("inf"):
                    events.append((until, 2, number))
        # At one number calls come before returns: steps that touch there overlap.
        for _, what, number in sorted(events):
            if what == 0:
                self._call(number)
            elif what == 2:
                self._retire(number)
            else:
                before = self._frontier
                if not self._return(number):
                    undecided = self._explored > self._explored_max
                    states = () if undecided else tuple(sorted({state for _, state in before.debts}))
                    answer = Answer.UNDECIDED if undecided else Answer.VIOLATED
                    return Outcome(answer, number, states, self._explored)
        return Outcome(Answer.LINEARIZABLE, None, (), self._explored)

    def _call(self, number: int) -> None:
        step = self._steps[number]
        if self._free:
            bit = heapq.heappop(self._free)
        else:
            bit = 1 << self._bits_used
            self._bits_used += 1
        self._bits[number] = bit
        if step.returned is None:
            self._open[bit] = number
        elif not step.assigns:
            self._observers[bit] = number
            self._owe(bit)
        elif step.blind and self._until[number] < step.called:
            self._unseen[bit] = number
            self._owe(bit)
        else:
            self._writers[bit] = number

    def _owe(self, bit: int) -> None:
        """A step that has to take effect is pending: now, in the configurations that allow it (an observer), or later."""
        frontier = _Frontier()
        for (done, state), debts in self._frontier.debts.items():
            settled = self._satisfied(state)
            for debt in debts:
                frontier.add(done, state, (debt | bit) & ~settled)
        self._frontier = frontier

    def _satisfied(self, state: State) -> int:
        """Bits of the pending observers that `state` lets take effect."""
        return sum(bit for bit, number in self._observers.items() if self._steps[number].allowed(state))

    def _retire(self, number: int) -> None:
        """Nobody can see any more whether this step without a return took effect."""
        bit = self._bits.pop(number)
        del self._open[bit]
        self._forget(bit)

    def _forget(self, bit: int) -> None:
        frontier = _Frontier()
        for (done, state), debts in self._frontier.debts.items():
            for debt in debts:
                frontier.add(done & ~bit, state, debt & ~bit)
        self._frontier = frontier
        heapq.heappush(self._free, bit)

    def _return(self, number: int) -> bool:
        """Keep the configurations in which the step can have taken effect by now. False if there are none."""
        bit = self._bits.pop(number)
        kept = _Frontier()
        owed = bit not in self._writers
        seen = _Frontier()
        waiting: list[tuple[int, State, int]] = []
        for (done, state), debts in self._frontier.debts.items():
            for debt in debts:
                if (debt & bit == 0) if owed else (done & bit != 0):
                    kept.add(done, state, debt)
                elif seen.add(done, state, debt):
                    waiting.append((done, state, debt))
        satisfied: dict[State, int] = {}
        while waiting:
            self._explored += 1
            if self._explored > self._explored_max:
                return False
            for done, state, debt in self._next(waiting.pop(), satisfied):
                if (debt & bit == 0) if owed else (done & bit != 0):
                    kept.add(done, state, debt)
                elif seen.add(done, state, debt):
                    waiting.append((done, state, debt))
        if not kept.debts:
            return False
        for pending in (self._observers, self._unseen, self._writers):
            pending.pop(bit, None)
        self._frontier = kept
        self._forget(bit)
        return True

    def _next(self, node: tuple[int, State, int], satisfied: dict[State, int]) -> list[tuple[int, State, int]]:
        """The configurations one assignment further."""
        done, state, debt = node
        found = []
        for bit, number in self._writers.items():
            if not done & bit and self._steps[number].allowed(state):
                found.append((done | bit, number, debt))
        for bit, number in self._unseen.items():
            if debt & bit:
                found.append((done, number, debt & ~bit))
        used: set[int] = set()
        for bit, number in self._open.items():
            # Of steps without a return that do the same, the one called first may as well be the first to be used.
            if not debt & bit and self._kinds[number] not in used and self._steps[number].allowed(state):
                used.add(self._kinds[number])
                found.append((done, number, debt | bit))
        return [self._take(after, number, owing, state, satisfied) for after, number, owing in found]

    def _take(
        self, done: int, number: int, debt: int, state: State, satisfied: dict[State, int]
    ) -> tuple[int, State, int]:
        """The configuration after step `number` took effect in `state`, with everything done that costs nothing."""
        step = self._steps[number]
        after = step.after(state)
        if self._unseen and step.blind:
            slots = {slot for slot, _ in step.assigns}
            for bit, hidden in self._unseen.items():
                if debt & bit and all(slot in slots for slot, _ in self._steps[hidden].assigns):
                    debt &= ~bit
        settled = satisfied.get(after)
        if settled is None:
            settled = satisfied[after] = self._satisfied(after)
        return done, after, debt & ~settled
