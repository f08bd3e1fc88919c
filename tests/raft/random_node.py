"""One node of a random cluster: its core, its disk, and what a crash loses."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from marble.raft.core import Raft
from marble.raft.messages import Message
from marble.types import HardState, SnapshotMeta

Row = tuple[int, str]
"""Term and payload of an entry."""


@dataclass
class Write:
    """One sync under way: what it makes durable, and what waits for it."""

    number: int
    hard_state: HardState | None
    first: int
    rows: list[Row]
    snapshot: SnapshotMeta | None
    messages: list[tuple[Message, list[str]]]


@dataclass
class Node:
    """A core, its disk, and the driver's memory."""

    id: int
    raft: Raft
    life: int = 0
    alive: bool = True
    rate: float = 1.0
    ticked_us: int = 0
    # What is on the disk; rows follow the snapshot or what was purged before it.
    rows: list[Row] = field(default_factory=list)
    base: int = 0
    base_term: int = 0
    snapshot: SnapshotMeta | None = None
    hard_state: HardState = field(default_factory=HardState)
    # What a crash loses: writes under way, what waits to be applied, and payloads by position.
    writes: deque[Write] = field(default_factory=deque)
    applying: deque[tuple[int, int]] = field(default_factory=deque)
    installing: SnapshotMeta | None = None
    payloads: dict[tuple[int, int], str] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)

    def row(self, index: int) -> Row | None:
        """Entry `index` on the disk, if it is there."""
        at = index - self.base - 1
        return self.rows[at] if 0 <= at < len(self.rows) else None

    @property
    def last(self) -> int:
        """The last entry on the disk."""
        return self.base + len(self.rows)


class Violation(AssertionError):
    """Raft broke a promise."""
