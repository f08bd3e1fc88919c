"""What goes into and comes out of the core: messages between nodes, and `Ready`, the one door for all effects.

Rule 1: these are frozen values, checked when they are made. A message from the network that cannot be made is a
`ProtocolError` of the peer; it never reaches the core. Messages name ranges of entries (`EntrySpan`: indexes, terms and
sizes), never payloads; the driver attaches the batches.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from marble._core.term_index import EntrySpan
from marble.errors import ProtocolError
from marble.types import INDEX_MAX, NODE_ID_MAX, HardState, Members, Role, SnapshotMeta

PRIORITY_MAX: Final = 2**16 - 1
"""Priorities travel as uint16."""

TRANSFER_CAMPAIGN: Final = 1
"""The ``context`` of a REQUEST_VOTE that a leader has asked for by TIMEOUT_NOW."""


class MessageKind(enum.IntEnum):
    """Kinds of message. The numbers are on the wire: never reuse one.

    From SNAPSHOT_FETCH on they are between drivers, and the core refuses them.
    """

    REQUEST_PRE_VOTE = 1
    REQUEST_PRE_VOTE_RESPONSE = 2
    REQUEST_VOTE = 3
    REQUEST_VOTE_RESPONSE = 4
    APPEND_ENTRIES = 5
    APPEND_ENTRIES_RESPONSE = 6
    HEARTBEAT = 7
    HEARTBEAT_RESPONSE = 8
    READ_INDEX = 9
    READ_INDEX_RESPONSE = 10
    INSTALL_SNAPSHOT = 11
    """Raft §7. The sender has a snapshot at ``log_index``; the driver fetches it before the core sees this."""
    INSTALL_SNAPSHOT_RESPONSE = 12
    """``reject``: the snapshot at ``log_index`` could not be fetched or installed."""
    TIMEOUT_NOW = 13
    """Leader transfer: campaign at once (thesis §3.10)."""
    QUIESCE = 14
    """A heartbeat that says: the group is idle; stop ticking until anybody has something to say."""
    SNAPSHOT_FETCH = 15
    """Send the piece that starts at byte ``context`` of the snapshot at ``log_index`` of ``log_term``; or, if ``reject_hint``
    is not 0, of the file whose name has that key (`marble.machine.FileRef.key`), which any node may have."""
    SNAPSHOT_PIECE = 16
    """That piece; all numbers as in the question. ``reject``: there is no such snapshot any more, or no such file."""
    NODE_BEAT = 17
    """One for all quiesced groups that the sender leads; ``context`` names this life of the sender."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message from `sender` to `to`; field by field etcd/raft's ``raftpb.Message``, under the field's names.

    - ``term`` is the sender's term, except in pre-votes, which carry the term asked for (thesis §9.6).
    - APPEND_ENTRIES: ``log_index`` and ``log_term`` name the entry before ``entries``; ``entries`` may be empty (a
      probe) but not None.
    - APPEND_ENTRIES_RESPONSE: accepted: ``log_index`` is the last index known to match. Rejected: ``log_index`` is the
      ``log_index`` that was refused; ``reject_hint`` and ``log_term`` say where to look next (the follower's best guess
      of a match).
    - HEARTBEAT: ``commit`` is never above what the follower is known to hold.
    - ``context`` ties the rounds of ReadIndex together. It is made by the core, never by a caller; 0 means none. In a
      REQUEST_VOTE, 1 says that the leader itself asked for this election (`TRANSFER_CAMPAIGN`, thesis §3.10).
    - INSTALL_SNAPSHOT: ``log_index`` and ``log_term`` are the snapshot's, ``members`` the membership in it.
    - QUIESCE: ``log_index`` is the leader's last index, ``commit`` the same.
    - ``priority`` is the candidate's, in both requests for votes.
    - Both requests for votes, and their responses: ``commit`` is the sender's commit index, ``reject_hint`` the term of
      that entry (raft-rs; see `candidate.learn_commit`).
    - ``changes``: indexes, ascending, of those of ``entries`` that change the membership.
    """

    kind: MessageKind
    sender: int
    to: int
    term: int
    log_index: int = 0
    log_term: int = 0
    commit: int = 0
    entries: EntrySpan | None = None
    reject: bool = False
    reject_hint: int = 0
    context: int = 0
    priority: int = 0
    members: Members | None = None
    changes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (1 <= self.sender <= NODE_ID_MAX and 1 <= self.to <= NODE_ID_MAX):
            raise ProtocolError(f"node ids {self.sender} -> {self.to} are not within 1 to {NODE_ID_MAX}")
        # Spelled out: every message passes here, and a loop over names costs more than all the rest.
        if not (
            0 <= self.term <= INDEX_MAX
            and 0 <= self.log_index <= INDEX_MAX
            and 0 <= self.log_term <= INDEX_MAX
            and 0 <= self.commit <= INDEX_MAX
            and 0 <= self.reject_hint <= INDEX_MAX
            and 0 <= self.context <= INDEX_MAX
        ):
            raise ProtocolError(f"a number of a {self.kind.name} is not within 0 to {INDEX_MAX}: {self}")
        if (self.entries is not None) != (self.kind is MessageKind.APPEND_ENTRIES):
            raise ProtocolError(f"a {self.kind.name} with {'' if self.entries else 'no '}entries")
        if (self.members is not None) != (self.kind is MessageKind.INSTALL_SNAPSHOT):
            raise ProtocolError(f"a {self.kind.name} with {'' if self.members else 'no '}members")
        if not 0 <= self.priority <= PRIORITY_MAX:
            raise ProtocolError(f"priority {self.priority} is not within 0 to {PRIORITY_MAX}")
        if self.changes and (
            self.entries is None
            or not self.entries.first <= self.changes[0] <= self.changes[-1] < self.entries.end
            or any(first >= second for first, second in pairwise(self.changes))
        ):
            raise ProtocolError(f"changes {self.changes} are not ascending indexes of the entries")
        if self.entries is not None:
            if self.entries.first != self.log_index + 1:
                raise ProtocolError(f"entries start at {self.entries.first}, not after log_index {self.log_index}")
            # Terms never fall along a log and never exceed the sender's term.
            if (
                len(self.entries)
                and not self.log_term <= self.entries.first_term <= self.entries.last_term <= self.term
            ):
                raise ProtocolError(
                    f"terms of entries {self.entries.first_term} to {self.entries.last_term} do not lie between "
                    f"log_term {self.log_term} and the message's term {self.term}"
                )


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of indexes ``[first, end)``; never empty."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class ReadState:
    """The answer to `Raft.read_index`: once ``index`` is applied, the read `request` is linearizable (thesis §6.4).

    ``index`` 0 means that the read was dropped (this node lost the lead or the term): ask again.
    """

    request: int
    index: int


@dataclass(frozen=True, slots=True)
class RoleChanged:
    """An event for observers: this node's role, term or known leader changed. ``leader`` is 0 when unknown.

    ``noop_index`` is not 0 exactly when the node has just become leader: where in the log its no-op stands.
    The driver makes that entry (kind NOOP); it is in the `append` of the same Ready.
    """

    role: Role
    term: int
    leader: int
    noop_index: int = 0


@dataclass(frozen=True, slots=True)
class MembershipProposed:
    """The leader has put entry ``index`` of ``term`` into its log, from whose application on the group is `members`.

    The driver makes that entry (kind MEMBERSHIP); it is in the `append` of the same Ready.
    """

    index: int
    term: int
    members: Members


@dataclass(frozen=True, slots=True)
class Ready:
    """All effects of the steps since the last Ready, in the order in which the driver carries them out.

    1. send ``messages`` at once;
    2. persist ``hard_state``, then that the log now starts after ``snapshot``, then the entries ``append`` (which replace
       everything from ``append.first`` on), under one sync if ``must_sync``; then call ``Raft.persisted(number)``;
    3. only then send ``messages_after_persist``;
    4. put the state of ``snapshot`` in the place of the machine's, apply ``committed``, then call ``Raft.applied``; answer
       ``reads`` whose index is applied.
    """

    number: int
    hard_state: HardState | None
    append: Span | None
    must_sync: bool
    messages: tuple[Message, ...]
    messages_after_persist: tuple[Message, ...]
    committed: Span | None
    reads: tuple[ReadState, ...]
    events: tuple[RoleChanged, ...]
    snapshot: SnapshotMeta | None = None
    memberships: tuple[MembershipProposed, ...] = ()
