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

MEMBERS_MAX: Final = 63
"""Nodes of one group, learners included: each costs its leader a window of messages and every commit a comparison."""

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
    MEMBERSHIP = 8
    """From here on the group consists of the members in the payload (`marble.members`): all of them, not the difference."""
    OPEN_SESSION = 9
    """A client registers; its session's number is the index of this entry. No payload."""
    CLOSE_SESSION = 10
    """The session in ``session`` ends, and its answers are forgotten. No payload."""
    SNAPSHOT = 11
    """Not an entry. In a node's own log: everything up to ``index``, whose term is ``term``, is in a snapshot, and the log of
    the group goes on after it. Between nodes: one row that carries a snapshot's description or a piece of it."""
    DELETE_RANGE = 12
    """Delete from ``table`` all rows whose keys lie in the range in the payload."""
    TRANSACTION = 13
    """Several WRITE, DELETE and DELETE_RANGE of any tables, in the payload: all of them take effect, or none."""


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
class Members:
    """Who takes part in a group: etcd's ``ConfState``. All tuples ascend and name no node twice.

    - While ``outgoing`` is not empty the group is joint (Raft §6): a majority of ``voters`` and one of ``outgoing`` decide.
    - ``learners`` get the log and have no vote; none of them is in ``voters`` or ``outgoing``.
    - ``learners_next`` are in ``outgoing``, not in ``voters``: they become learners when the joint group is left.
    - ``auto_leave``: the leader leaves the joint group by itself as soon as it has been applied.
    """

    voters: tuple[int, ...] = ()
    outgoing: tuple[int, ...] = ()
    learners: tuple[int, ...] = ()
    learners_next: tuple[int, ...] = ()
    auto_leave: bool = False

    @property
    def joint(self) -> bool:
        """Whether two majorities are needed."""
        return bool(self.outgoing)

    @property
    def all(self) -> tuple[int, ...]:
        """Every node that takes part in any way, ascending."""
        return tuple(sorted({*self.voters, *self.outgoing, *self.learners, *self.learners_next}))


class ChangeKind(enum.Enum):
    """What a change of the membership does with a node."""

    ADD_VOTER = "add-voter"
    """Make it a voter, whether it is new or a learner."""
    ADD_LEARNER = "add-learner"
    """Make it a learner, whether it is new or a voter."""
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the membership; several make one step (Raft §6)."""

    kind: ChangeKind
    node: int


class Transition(enum.Enum):
    """How a change of the membership takes effect (etcd's ``ConfChangeTransition``)."""

    AUTO = "auto"
    """At once if at most one voter changes, else joint and left by itself."""
    JOINT = "joint"
    """Through a joint group that the leader leaves by itself."""
    EXPLICIT = "explicit"
    """Through a joint group that stays until somebody asks to leave it."""


@dataclass(frozen=True, slots=True)
class SnapshotMeta:
    """What a snapshot stands for: the state after entry ``index`` of ``term``, and who the members were then."""

    index: int
    term: int
    members: Members


@dataclass(frozen=True, slots=True)
class Position:
    """Where an entry stands in the log of its group: the pair that names it for ever."""

    index: int
    term: int
