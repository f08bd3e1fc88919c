"""Clients of the simulated cluster: many at once, impatient, each with one operation at a time, and with an honest record of all of it.

Rule 1: the history holds what a client could know: when it asked, what it was answered, or nothing. What an operation did to a node is for
        the node's witness.
Rule 2: an operation that certainly had no effect is tried again, at another node. One whose outcome is not known is left so, unless its
        client has a session: then it is sent again under its number, until it is answered or the client gives up.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa

from marble._core.entry_batch import Proposal
from marble.errors import (
    CorruptionError,
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    SessionExpiredError,
    UnavailableError,
)
from marble.lsm import payload
from marble.promises import Committed, promise
from marble.testing.history import History
from marble.testing.ledger import Violation
from marble.testing.node import SimulatedNode
from marble.testing.world import World
from marble.types import EntryKind

TABLE: Final = "t"
SCHEMA: Final = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.int64())])
KEY_SCHEMA: Final = pa.schema([SCHEMA.field("k")])
CREATE: Final = Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table(TABLE, SCHEMA, ["k"]))
OPEN_SESSION: Final = Proposal(EntryKind.OPEN_SESSION)
ATTEMPTS_MAX: Final = 6
"""A client with a session gives up after so many timeouts."""


@dataclass(slots=True, eq=False)
class Operation:
    """What a client wants. ``number`` is its place in the history; -1 for what is none of the history's: to create a table, to open a
    session.

    ``value`` is None for a delete; ``stamp`` is its session and number, zeros without one.
    """

    kind: str
    group: int
    key: int
    value: int | None = None
    number: int = -1
    done: bool = False
    last: bool = False
    """It is one of those that a client ends with."""
    stamp: tuple[int, int] = (0, 0)
    attempts: int = 0
    open: int = 0
    """Attempts that may have an effect yet, or may have had one."""


@dataclass(slots=True)
class Sales:
    """What all clients share: the history, and the tables that are there."""

    history: History
    tables: dict[int, int]
    """Group -> id of its table, once somebody knows it."""
    acknowledged: int = 0
    refused: int = 0
    lost: int = 0
    next_value: int = 1


class Client:
    """One client.

    Parameters
    ----------
    number
        Names it in the history.
    nodes
        All nodes, by number; the client knows nothing of them but how to reach them.
    """

    def __init__(self, world: World, number: int, nodes: dict[int, SimulatedNode], sales: Sales) -> None:
        self.number = number
        self.operation: Operation | None = None
        self._world = world
        self._loop = world.loop
        self._nodes = nodes
        self._sales = sales
        self.finished = False
        """It was told to end, and has ended with an answered read of each key."""
        self._last: list[tuple[int, int]] | None = None
        self._turn = 0
        self._contact = 0
        self._keys: dict[int, pa.RecordBatch] = {}
        self._exact = world.loop.chance(world.plan.load.exact)
        self._sessions: dict[int, list[int]] = {}
        """Group -> its session there, and the last number used in it."""

    def start(self) -> None:
        """Begin with the first operation, some time from now."""
        self._loop.after(self._loop.between(0, self._world.plan.load.think_us), self._begin)

    def finish(self) -> None:
        """The faults are over: end with a read, a write and another read of each key, each of which must be answered.

        The read comes first: a leader must be able to answer it although nobody writes (Raft §8).
        """
        load = self._world.plan.load
        self._last = [(group, key) for group in range(self._world.plan.groups) for key in range(load.keys)]

    # -- asking ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        loop, load, sales = self._loop, self._world.plan.load, self._sales
        draw = loop.random.random()
        group, key = loop.between(0, self._world.plan.groups - 1), loop.between(0, load.keys - 1)
        if self._last is not None:
            if not self._last:
                self.finished = True
                return
            draw = 1.0 if self._turn == 1 else 0.0
            group, key = self._last[-1]
        if group not in sales.tables:
            operation = Operation("create", group, 0)
        elif self._exact and group not in self._sessions:
            operation = Operation("open", group, 0)
        elif draw < load.reads:
            operation = Operation("read", group, key)
            operation.number = sales.history.read(self.number, (group, key), loop.now)
        elif draw < load.reads + load.deletes:
            operation = Operation("delete", group, key)
            operation.number = sales.history.delete(self.number, [(group, key)], loop.now)
        else:
            operation = Operation("write", group, key, sales.next_value)
            sales.next_value += 1
            operation.number = sales.history.write(self.number, (group, key), operation.value, loop.now)
        operation.last = self._last is not None and operation.number >= 0
        if operation.kind in ("write", "delete"):
            self._stamp(operation)
        self.operation = operation
        loop.after(load.timeout_us, self._give_up, operation)
        self._ask(operation)

    def _stamp(self, operation: Operation) -> None:
        session = self._sessions.get(operation.group)
        if session is not None:
            session[1] += 1
            operation.stamp = (session[0], session[1])

    def _ask(self, operation: Operation) -> None:
        """Send `operation` to whom the client takes for the leader, or to anybody."""
        loop, load = self._loop, self._world.plan.load
        if not self._contact or loop.chance(load.stray):
            self._contact = loop.random.choice(list(self._nodes))
        if loop.chance(load.loss):
            self._world.injected["lost requests"] += 1
            return
        operation.open += 1
        loop.after(loop.between(50, 2000), self._arrive, operation, self._contact)

    def _arrive(self, operation: Operation, number: int) -> None:
        node = self._nodes[number]
        if not node.alive:
            operation.open -= 1
            self._refused(operation, 0)
        elif operation.kind == "read":
            found: Future[int] = promise()
            found.add_done_callback(partial(self._heard, self._read, operation, number))
            node.read_index(operation.group, found, self._loop.chance(0.5))
        else:
            done: Future[Committed] = promise()
            done.add_done_callback(partial(self._heard, self._written, operation, number))
            node.propose(operation.group, self._proposal(operation), done)

    def _proposal(self, operation: Operation) -> Proposal:
        if operation.kind == "create":
            return CREATE
        if operation.kind == "open":
            return OPEN_SESSION
        table = self._sales.tables[operation.group]
        if operation.kind == "delete":
            return Proposal(EntryKind.DELETE, table, payload.encode_rows(self._key(operation.key)), *operation.stamp)
        row = pa.record_batch([pa.array([operation.key], pa.int64()), pa.array([operation.value], pa.int64())], SCHEMA)
        return Proposal(EntryKind.WRITE, table, payload.encode_rows(row), *operation.stamp)

    def _key(self, key: int) -> pa.RecordBatch:
        batch = self._keys.get(key)
        if batch is None:
            batch = self._keys[key] = pa.record_batch([pa.array([key], pa.int64())], schema=KEY_SCHEMA)
        return batch

    # -- hearing -----------------------------------------------------------------------------------------------------

    def _heard(self, action: Callable[..., None], operation: Operation, number: int, future: Future[Any]) -> None:
        """A node has decided `future`. What is wrong with that is raised by the loop: a future only logs what its callbacks raise."""
        try:
            action(operation, number, future)
        except Exception as error:
            self._loop.after(0, _throw, error)

    def _written(self, operation: Operation, number: int, future: Future[Committed]) -> None:
        error = future.exception()
        if error is None:
            self._answer(operation, number, future.result().value)
        else:
            self._failed(operation, number, error)

    def _read(self, operation: Operation, number: int, future: Future[int]) -> None:
        error = future.exception()
        if error is not None:
            self._failed(operation, number, error)
            return
        node = self._nodes[number]
        machine = node.seats[operation.group].machine
        try:
            found = machine.read(self._sales.tables[operation.group]).get_many(self._key(operation.key))
        except CorruptionError as damage:
            if not node.tables.excuses(damage):
                raise
            self._world.injected["reads of damaged files"] += 1
            operation.open -= 1
            self._later(self._refused, operation, 0)
            return
        self._answer(operation, number, found.column(1)[0].as_py())

    def _failed(self, operation: Operation, number: int, error: BaseException) -> None:
        if isinstance(error, (NotLeaderError, UnavailableError)):
            operation.open -= 1
        if isinstance(error, NotLeaderError):
            core = self._world.cores[operation.group].get(number)
            self._later(self._refused, operation, core.leader if core is not None else 0)
        elif isinstance(error, UnavailableError):
            self._later(self._refused, operation, 0)
        elif isinstance(error, SessionExpiredError):
            operation.open -= 1
            self._later(self._expired, operation)
        elif not isinstance(error, OutcomeUnknownError):
            text = f"client {self.number}: {operation} failed: {error}"
            raise Violation(text) if isinstance(error, MarbleError) else error

    def _answer(self, operation: Operation, number: int, value: Any) -> None:
        self._later(self._answered, operation, number, value)

    def _later(self, action: Any, *arguments: Any) -> None:
        """An answer is on its way to the client, or gets lost there."""
        if self._loop.chance(self._world.plan.load.loss):
            self._world.injected["lost answers"] += 1
        else:
            self._loop.after(self._loop.between(50, 2000), action, *arguments)

    def _answered(self, operation: Operation, number: int, value: Any) -> None:
        if operation.done:
            return
        if operation.kind == "create":
            self._sales.tables[operation.group] = value
        elif operation.kind == "open":
            self._sessions[operation.group] = [value, 0]
        else:
            self._sales.acknowledged += 1
            answer = None if operation.kind == "write" else value
            self._sales.history.answer(operation.number, answer, self._loop.now)
        self._loop.note(0, "client {}: {} at node {}: {}", self.number, operation, number, value)
        self._contact = number
        if operation.last and self._last:
            self._turn += 1
            if self._turn == 3:
                self._turn = 0
                self._last.pop()
        self._end(operation)

    def _refused(self, operation: Operation, leader: int) -> None:
        """It certainly had no effect: ask again, elsewhere."""
        if operation.done:
            return
        self._contact = leader
        self._loop.after(self._loop.between(1000, 100_000), self._ask_again, operation)

    def _expired(self, operation: Operation) -> None:
        """Its session is over. What may have had an effect before must not be done under another number."""
        self._sessions.pop(operation.group, None)
        if operation.done:
            return
        self._world.injected["sessions expired"] += 1
        if operation.open:
            self._sales.lost += 1
            self._end(operation)
        else:
            operation.stamp = (0, 0)
            self._refused(operation, self._contact)

    def _ask_again(self, operation: Operation) -> None:
        if not operation.done:
            self._ask(operation)

    def _give_up(self, operation: Operation) -> None:
        if operation.done:
            return
        operation.attempts += 1
        if operation.stamp != (0, 0) and operation.attempts < ATTEMPTS_MAX:
            self._contact = 0
            self._loop.after(self._world.plan.load.timeout_us, self._give_up, operation)
            self._ask(operation)
            return
        if operation.open:
            self._sales.lost += 1
        elif operation.number >= 0:
            # Every node that was asked has said that it did nothing, and will do nothing.
            self._sales.history.refuse(operation.number)
            self._sales.refused += 1
        self._contact = 0
        self._end(operation)

    def _end(self, operation: Operation) -> None:
        operation.done = True
        self.operation = None
        self._loop.after(self._loop.between(0, self._world.plan.load.think_us), self._begin)


def _throw(error: Exception) -> None:
    raise error
