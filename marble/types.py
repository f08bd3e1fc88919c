"""The words of marble: positions, entries and the limits that every floor shares.

Rule 1: nothing here does anything. These are names and values; whoever needs behaviour looks one floor up.

Positions are Raft indexes and start at 1; 0 means "before the first entry". Ranges are half-open ``[first, end)``.
``purged_index <= snapshot_index <= applied_index <= commit_index <= last_index`` and ``persisted_index <= last_index``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

NO_NODE: Final = 0
"""A node id that no node has: "nobody" in a vote or as leader. Node ids are 1 to ``NODE_ID_MAX``."""

NODE_ID_MAX: Final = 2**32 - 1
"""Node ids travel as uint32."""

INDEX_MAX: Final = 2**63 - 1
"""Indexes and terms travel as uint64 but must fit a signed 64-bit integer, so that any Arrow tool can query them."""

PAYLOAD_ALIGNMENT_BYTES: Final = 64
"""Every payload is a whole number of these, so that the payloads of a batch all start aligned and decode without a copy."""


class Role(enum.Enum):
    """What a node is in its group at this moment (Raft §5.1; pre-candidate: thesis §9.6)."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


class EntryKind(enum.IntEnum):
    """What a row of the log means. The numbers are on disk and on the wire: never reuse one."""

    HARD_STATE = 1
    """Not an entry: term in ``term``, commit index in ``index``, vote in ``session``. Only in a node's own log, never on the wire."""
    NOOP = 2
    """What a new leader appends first (Raft §8). No payload."""
    WRITE = 3
    """Upsert of the rows in the payload into ``table``."""
    DELETE = 4
    """Delete from ``table`` the rows whose keys are in the payload."""
    CREATE_TABLE = 5
    DROP_TABLE = 6
    COMMAND = 7
    """Bytes that belong to the user (``propose_operation``)."""


@dataclass(frozen=True, slots=True)
class HardState:
    """What a node must remember over a crash (Raft figure 2, "persistent state on all servers").

    - ``term`` never goes back; ``vote`` changes at most once in a term, from ``NO_NODE``.
    - ``commit`` is a hint that spares work after a restart; losing it loses nothing.
    """

    term: int = 0
    vote: int = NO_NODE
    commit: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """Where an entry stands in the log of its group: the pair that names it for ever."""

    index: int
    term: int
