"""The history oracle: what clients asked and were answered, and whether one order of it all explains the answers.

A test records each operation of each client in a `History`: its call before it is sent, its answer after it came. `check`
then says whether the history is linearizable (Herlihy and Wing, 1990): whether each operation can be given one moment
between its call and its answer, such that a single register, or table, that does one operation at a time would have
answered the same. The search is in `marble.testing.linearize`, what makes its answer short in `marble.testing.witness`.

- Registers: `History.write`, `read`, `cas`. Tables: `upsert`, `delete`, `get`, `scan`. They are one model: a key holds a
  value, None where there is none, and both kinds may be mixed.
- An operation whose outcome is not known (the client gave up, or died) may have taken effect at any time after its call,
  or may do so yet, or never. That is what an operation is that was neither answered nor refused.
- A refused operation is one that certainly had no effect, and never will have. It is left out; so whoever sees its
  value has seen a value that was never written.

Keys are checked one by one, which is complete for operations of one key (linearizability is local, Herlihy and Wing
§3.2) and makes the check fast. An operation on several keys (a batch of rows, a scan) then counts as one on each, so
that a scan that saw half of a batch passes. ``check(history, atomic=True)`` keeps together the keys that one operation
touches and notices that; it is for small histories.

Rule 1: the order of calls and answers is the order in which they were recorded, not what a clock said. Times are for
people.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from marble.errors import check as check_invariant
from marble.testing.linearize import UNSEEN, Answer, Pairs, Search, State, Step
from marble.testing.witness import shrink

EXPLORED_MAX: Final = 200_000
"""Configurations that the search for one key may look at: some seconds. A few clients need a handful for each operation."""

Row = tuple[Hashable, Hashable]


class OperationKind(enum.Enum):
    """What a client asked for, with what `Operation.argument` and `Operation.answer` then are."""

    WRITE = "write"
    """Argument: key -> value. Answer: None."""
    DELETE = "delete"
    """Argument: keys. Answer: how many of them were there, or None if that was not said. Checked if it is none or all."""
    CAS = "cas"
    """Argument: key, expected value, new value. Answer: whether it took effect."""
    READ = "read"
    """Argument: key. Answer: its value."""
    GET = "get"
    """Argument: keys. Answer: key -> value of those that are there."""
    SCAN = "scan"
    """Argument: first key or None, end or None. Answer: key -> value."""


@dataclass(slots=True)
class Operation:
    """One operation of one client.

    - ``called < returned``: places in the order of all calls and answers of the history; ``returned`` is None while the
      outcome is not known. ``called`` is also its number.
    - ``called_at``, ``returned_at``: the times that the recorder gave.
    """

    client: Hashable
    kind: OperationKind
    argument: Any
    called: int
    called_at: int
    returned: int | None = None
    returned_at: int = 0
    answer: Any = None
    refused: bool = False

    def __str__(self) -> str:
        what = self.argument
        match self.kind:
            case OperationKind.WRITE:
                text = ", ".join(f"{key!r} = {value!r}" for key, value in what.items())
            case OperationKind.CAS:
                text = f"{what[0]!r} from {what[1]!r} to {what[2]!r}"
            case OperationKind.READ:
                text = repr(what)
            case OperationKind.SCAN:
                bounds = zip(("from", "to"), what, strict=True)
                text = " ".join(f"{word} {bound!r}" for word, bound in bounds if bound is not None) or "all"
            case _:
                text = ", ".join(map(repr, what))
        text = f"{self.kind.value} {text}"
        if self.returned is None:
            return text + " -> unknown"
        return text if self.answer is None and self.kind is not OperationKind.READ else f"{text} -> {self.answer!r}"


class History:
    """Operations of many clients, in the order in which they were called and answered.

    Each method that starts an operation returns its number, with which `answer` or `refuse` ends it. ``at`` is any time
    that helps a reader, in any unit. Several threads may record at once.

    Attributes
    ----------
    operations
        Number -> operation, in the order of their calls.
    """

    def __init__(self) -> None:
        self.operations: dict[int, Operation] = {}
        self._order = itertools.count(1)

    def write(self, client: Hashable, key: Hashable, value: Hashable, at: int = 0) -> int:
        """`client` sets `key` to `value`."""
        return self._call(client, OperationKind.WRITE, {key: value}, at)

    def upsert(self, client: Hashable, rows: Mapping[Any, Hashable], at: int = 0) -> int:
        """`client` sets each key of `rows` to its value, all at once."""
        return self._call(client, OperationKind.WRITE, dict(rows), at)

    def delete(self, client: Hashable, keys: Collection[Hashable], at: int = 0) -> int:
        """`client` deletes `keys`, all at once."""
        return self._call(client, OperationKind.DELETE, tuple(keys), at)

    def cas(self, client: Hashable, key: Hashable, expected: Hashable, value: Hashable, at: int = 0) -> int:
        """`client` sets `key` to `value` if it is `expected`."""
        return self._call(client, OperationKind.CAS, (key, expected, value), at)

    def read(self, client: Hashable, key: Hashable, at: int = 0) -> int:
        """`client` reads `key`."""
        return self._call(client, OperationKind.READ, key, at)

    def get(self, client: Hashable, keys: Collection[Hashable], at: int = 0) -> int:
        """`client` reads `keys`, all at one moment."""
        return self._call(client, OperationKind.GET, tuple(keys), at)

    def scan(self, client: Hashable, first: Any = None, end: Any = None, at: int = 0) -> int:
        """`client` reads all keys in ``[first, end)``, all at one moment."""
        return self._call(client, OperationKind.SCAN, (first, end), at)

    def answer(self, number: int, value: Any = None, at: int = 0) -> None:
        """Operation `number` was answered with `value` (see `OperationKind`)."""
        operation = self._pending(number)
        operation.answer = dict(value) if isinstance(value, Mapping) else value
        operation.returned_at = at
        operation.returned = next(self._order)

    def refuse(self, number: int) -> None:
        """Operation `number` had no effect, and will have none."""
        self._pending(number).refused = True

    def _call(self, client: Hashable, kind: OperationKind, argument: Any, at: int) -> int:
        operation = Operation(client, kind, argument, next(self._order), at)
        self.operations[operation.called] = operation
        return operation.called

    def _pending(self, number: int) -> Operation:
        operation = self.operations[number]
        check_invariant(operation.returned is None and not operation.refused, f"operation {number} has ended already")
        return operation


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `check` found.

    Attributes
    ----------
    answer
        LINEARIZABLE; VIOLATED; or UNDECIDED: no violation was found, and at some keys the search gave up.
    keys
        Where: the keys that were checked together; empty if LINEARIZABLE.
    operations
        If VIOLATED: few operations that already have no order, by their calls.
    text
        All of it, for people.
    explored
        Configurations looked at, over all keys.
    """

    answer: Answer
    keys: tuple[Any, ...]
    operations: tuple[Operation, ...]
    text: str
    explored: int

    @property
    def ok(self) -> bool:
        """Whether the history was shown to be linearizable."""
        return self.answer is Answer.LINEARIZABLE

    def __str__(self) -> str:
        return self.text


def check(
    history: History | Iterable[Operation],
    *,
    initial: Hashable = None,
    atomic: bool = False,
    explored_max: int = EXPLORED_MAX,
) -> Verdict:
    """Whether `history` is linearizable.

    Parameters
    ----------
    history
        What was recorded. Operations that were neither answered nor refused count as unknown.
    initial
        What every key holds in the beginning; None: nothing.
    atomic
        Keep together the keys that one operation touches, and let it happen at all of them at one moment.
    explored_max
        Configurations that the search for one part may look at.

    Returns
    -------
    Verdict
        The same one for the same history. If there are violations at several keys, the one at the key that was
        touched first.
    """
    operations = list(history.operations.values()) if isinstance(history, History) else list(history)
    explored = 0
    undecided: list[Any] = []
    for part in _parts(operations, atomic):
        steps, start, _ = part.compile(initial)
        outcome = Search(steps, start, explored_max).run()
        explored += outcome.explored
        if outcome.answer is Answer.UNDECIDED:
            undecided += part.keys
        elif outcome.failed is not None:
            core = part.only(shrink(steps, start, outcome.failed, explored_max))
            text = core.explain(initial, explored_max, len(operations))
            return Verdict(Answer.VIOLATED, core.keys, tuple(touch.operation for touch in core.touches), text, explored)
    if undecided:
        names = ", ".join(map(repr, undecided[:10]))
        text = f"undecided: the search gave up after {explored_max} configurations at key {names}"
        return Verdict(Answer.UNDECIDED, tuple(undecided), (), text, explored)
    return Verdict(Answer.LINEARIZABLE, (), (), f"linearizable: {len(operations)} operations", explored)


@dataclass(frozen=True, slots=True)
class _Touch:
    """What one operation does at the keys of one part: guards and assignments as in `Step`, by key and value."""

    operation: Operation
    expects: dict[Any, Hashable] = field(default_factory=dict)
    differs: dict[Any, Hashable] = field(default_factory=dict)
    assigns: dict[Any, Hashable] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[Any, ...]:
        return tuple({**self.expects, **self.differs, **self.assigns})

    def at(self, key: Any) -> _Touch:
        """What it does at `key` alone."""
        maps = (self.expects, self.differs, self.assigns)
        return _Touch(self.operation, *({key: some[key]} if key in some else {} for some in maps))


@dataclass(frozen=True, slots=True)
class _Part:
    """Keys that are checked together, and all that touches them."""

    keys: tuple[Any, ...]
    touches: list[_Touch]

    def only(self, numbers: Sequence[int]) -> _Part:
        touches = [self.touches[number] for number in numbers]
        touched = {key for touch in touches for key in touch.keys}
        return _Part(tuple(key for key in self.keys if key in touched), touches)

    def compile(self, initial: Hashable, *, all_values: bool = False) -> tuple[list[Step], State, list[Hashable]]:
        """Steps, the state before them, and the value for each number; `all_values`: also those that nobody asks for."""
        slots = {key: slot for slot, key in enumerate(self.keys)}
        values: list[Hashable] = [None]
        numbers: dict[Hashable, int] = {}

        def name(value: Hashable) -> None:
            if value not in numbers:
                numbers[value] = len(values)
                values.append(value)

        for touch in self.touches:
            for value in (*touch.expects.values(), *touch.differs.values()):
                name(value)
            if all_values:
                for value in touch.assigns.values():
                    name(value)
        if all_values:
            name(initial)

        def pairs(some: Mapping[Any, Hashable]) -> Pairs:
            return tuple((slots[key], numbers.get(value, UNSEEN)) for key, value in some.items())

        steps = [
            Step(
                touch.operation.called,
                touch.operation.returned,
                pairs(touch.expects),
                pairs(touch.differs),
                pairs(touch.assigns),
            )
            for touch in self.touches
        ]
        return steps, (numbers.get(initial, UNSEEN),) * len(slots), values

    def explain(self, initial: Hashable, explored_max: int, total: int) -> str:
        """Why there is no order, for people."""
        steps, start, values = self.compile(initial, all_values=True)
        outcome = Search(steps, start, explored_max).run()
        where = ", ".join(map(repr, self.keys[:10])) + (", ..." if len(self.keys) > 10 else "")
        head = f"not linearizable at key {where}: no order of these {len(steps)} of {total} operations explains the answers"
        rows = [(f"client {t.operation.client}", str(t.operation), _span(t.operation)) for t in self.touches]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        if outcome.failed is not None:
            possible = ["/".join(repr(values[number]) for number in state) for state in outcome.states[:8]]
            lines[outcome.failed] += "  <- by then it can only have been " + " or ".join(possible)
        return "\n".join([head, *(line.rstrip() for line in lines)])


def _span(operation: Operation) -> str:
    end = "..." if operation.returned is None else str(operation.returned_at or operation.returned)
    return f"[{operation.called_at or operation.called}, {end}]"


def _parts(operations: Sequence[Operation], atomic: bool) -> list[_Part]:
    """The parts that can be checked apart, in the order in which they were first touched."""
    universe = _all_keys(operations)
    touches = [
        _touch(operation, universe)
        for operation in operations
        if not operation.refused
        and (
            operation.returned is not None
            or operation.kind in (OperationKind.WRITE, OperationKind.DELETE, OperationKind.CAS)
        )
    ]
    if not atomic:
        by_key: dict[Any, list[_Touch]] = {}
        for touch in touches:
            for key in touch.keys:
                by_key.setdefault(key, []).append(touch if len(touch.keys) == 1 else touch.at(key))
        return [_Part((key,), some) for key, some in by_key.items()]
    # Keys are in one part if a chain of operations links them.
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for touch in touches:
        for key in touch.keys:
            parent[root(key)] = root(touch.keys[0])
    linked: dict[Any, _Part] = {}
    for touch in touches:
        if touch.keys:
            part = root(touch.keys[0])
            linked.setdefault(part, _Part(tuple(key for key in parent if root(key) == part), [])).touches.append(touch)
    return list(linked.values())


def _all_keys(operations: Iterable[Operation]) -> tuple[Any, ...]:
    """All keys that anybody wrote or saw: where a scan that does not show them says that they are not there."""
    found: dict[Any, None] = {}
    for operation in operations:
        match operation.kind:
            case OperationKind.CAS:
                found[operation.argument[0]] = None
            case OperationKind.READ:
                found[operation.argument] = None
            case OperationKind.SCAN:
                found.update(dict.fromkeys(operation.answer or ()))
            case _:
                found.update(dict.fromkeys(operation.argument))
    return tuple(found)


def _touch(operation: Operation, universe: Collection[Any]) -> _Touch:
    """What `operation` says of each key that it touches."""
    what, answer = operation.argument, operation.answer
    match operation.kind:
        case OperationKind.WRITE:
            return _Touch(operation, assigns=what)
        case OperationKind.DELETE:
            nothing = dict.fromkeys(what)
            if answer == 0:
                return _Touch(operation, expects=nothing)
            if answer is not None and answer > len(nothing):
                # More than there can have been: guards that nothing meets.
                return _Touch(operation, expects=nothing, differs=nothing)
            # Which ones were there is only known if all were.
            return _Touch(operation, differs=nothing if answer == len(nothing) else {}, assigns=nothing)
        case OperationKind.CAS:
            key, expected, value = what
            if operation.returned is not None and not answer:
                return _Touch(operation, differs={key: expected})
            return _Touch(operation, expects={key: expected}, assigns={key: value})
        case OperationKind.READ:
            return _Touch(operation, expects={what: answer})
        case OperationKind.GET:
            asked = dict.fromkeys(what)
        case OperationKind.SCAN:
            first, end = what
            inside = (key for key in universe if (first is None or first <= key) and (end is None or key < end))
            asked = dict.fromkeys(inside)
    expects = {key: answer.get(key) for key in {**asked, **answer}}
    # A row that was not asked for has no place in the answer, whatever was written: a guard that nothing meets.
    return _Touch(operation, expects=expects, differs={key: row for key, row in answer.items() if key not in asked})
