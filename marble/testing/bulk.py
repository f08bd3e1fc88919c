"""Load for tables in files: writes and deletes of every kind, many rows at once, for which nobody waits.

What clients are told of single keys is checked by their history (`marble.testing.history`). This here is for what lies below: it fills
memtables and files, and each replica's tables are compared with the model (`marble.testing.model`) at its own applied index.

Rule 1: an answer says no more than where the table is. What took effect the model knows, since replicas applied it.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Final

import pyarrow as pa

from marble._core.entry_batch import Proposal
from marble._core.key_codec import KeyCodec
from marble.lsm import payload
from marble.promises import Committed, promise
from marble.raft.core import Raft
from marble.table_options import TableOptions
from marble.testing.node import SimulatedNode
from marble.testing.world import World
from marble.types import EntryKind, Role

PLAIN: Final = "plain"
SUMS: Final = "sums"
PLAIN_SCHEMA: Final = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("text", pa.string())])
SUMS_SCHEMA: Final = pa.schema(
    [pa.field("k", pa.int64(), nullable=False), pa.field("total", pa.int64()), pa.field("at", pa.timestamp("us"))]
)
KEY_SCHEMA: Final = pa.schema([PLAIN_SCHEMA.field("k")])
TTL_US: Final = 20_000_000
_CREATE: Final = {
    PLAIN: payload.encode_create_table(PLAIN, PLAIN_SCHEMA, ["k"], TableOptions(compression="lz4")),
    SUMS: payload.encode_create_table(
        SUMS, SUMS_SCHEMA, ["k"], TableOptions(None, "at", TTL_US, True, (("total", "sum"),))
    ),
}
ROWS_MAX: Final = 12
"""Of one write."""
_CODEC: Final = KeyCodec(KEY_SCHEMA)


class Bulk:
    """Writes into every group, by whatever node leads there, for as long as its plan wants it."""

    def __init__(self, world: World, nodes: dict[int, SimulatedNode]) -> None:
        self._world = world
        self._loop = world.loop
        self._nodes = nodes
        self._tables: dict[tuple[int, str], int] = {}
        if world.plan.tables is not None:
            self._later()

    def _later(self) -> None:
        tables = self._world.plan.tables
        if tables is not None and tables.load > 0:
            self._loop.after(1 + int(self._loop.random.expovariate(tables.load) * 1_000_000), self._write)

    def _write(self) -> None:
        self._later()
        group = self._loop.between(0, self._world.plan.groups - 1)
        leaders = [core for core in self._world.cores[group].values() if core.role is Role.LEADER]
        if leaders:
            core: Raft = leaders[self._loop.between(0, len(leaders) - 1)]
            done: Future[Committed] = promise()
            name = self._loop.random.choice((PLAIN, PLAIN, SUMS))
            if (group, name) not in self._tables:
                done.add_done_callback(partial(self._created, group, name))
                self._nodes[core.id].propose(group, Proposal(EntryKind.CREATE_TABLE, 0, _CREATE[name]), done)
            else:
                self._nodes[core.id].propose(group, self._proposal(group, name), done)

    def _created(self, group: int, name: str, done: Future[Committed]) -> None:
        if done.exception() is None:
            self._tables[group, name] = done.result().value

    def _proposal(self, group: int, name: str) -> Proposal:
        if self._loop.chance(0.15):
            known = [each for each in (PLAIN, SUMS) if (group, each) in self._tables]
            operations = [self._operation(group, self._loop.random.choice(known)) for _ in range(3)]
            return Proposal(EntryKind.TRANSACTION, 0, payload.encode_transaction(operations))
        operation = self._operation(group, name)
        return Proposal(operation.kind, operation.table, operation.payload)

    def _operation(self, group: int, name: str) -> payload.Operation:
        loop, table = self._loop, self._tables[group, name]
        tables = self._world.plan.tables
        keys = 1 if tables is None else tables.keys
        first = loop.between(0, keys - 1)
        # Neighbours more often than not: so that files have ranges of keys, and gaps between them.
        chosen = [
            (first + i if loop.chance(0.7) else loop.between(0, keys - 1)) for i in range(loop.between(1, ROWS_MAX))
        ]
        draw = loop.random.random()
        if draw < 0.75:
            if name == PLAIN:
                text = [f"{loop.between(0, 9)}" * loop.between(1, 150) for _ in chosen]
                return _operation(EntryKind.WRITE, table, PLAIN_SCHEMA, chosen, pa.array(text))
            values = pa.array([loop.between(-5, 5) for _ in chosen], pa.int64())
            return _operation(
                EntryKind.WRITE, table, SUMS_SCHEMA, chosen, values, pa.nulls(len(chosen), pa.timestamp("us"))
            )
        if draw < 0.96:
            return _operation(EntryKind.DELETE, table, KEY_SCHEMA, chosen)
        bounds = pa.record_batch([pa.array([first, first + loop.between(0, keys // 6)], pa.int64())], schema=KEY_SCHEMA)
        lower, upper = _CODEC.encode(bounds).to_pylist()
        return payload.Operation(EntryKind.DELETE_RANGE, table, payload.encode_range(lower, upper))


def _operation(
    kind: EntryKind, table: int, schema: pa.Schema, keys: list[int], *columns: pa.Array
) -> payload.Operation:
    batch = pa.record_batch([pa.array(keys, pa.int64()), *columns], schema=schema)
    return payload.Operation(kind, table, payload.encode_rows(batch))
