"""What can be seen of a core from outside: for drivers, people and tests.

Rule 1: looking changes nothing, but for the two timers that may be set to make a scenario.
"""

from __future__ import annotations

from marble.raft.log import RaftLog
from marble.raft.progress import Progress
from marble.raft.state import State
from marble.types import HardState, Members, Role, SnapshotMeta


class View:
    """The readable side of `marble.raft.core.Raft`."""

    def __init__(self, state: State) -> None:
        self._state = state

    @property
    def id(self) -> int:
        """This node."""
        return self._state.id

    @property
    def role(self) -> Role:
        """What this node is now."""
        return self._state.role

    @property
    def term(self) -> int:
        """The latest term that this node has seen."""
        return self._state.term

    @property
    def vote(self) -> int:
        """Whom it voted for in ``term``; ``NO_NODE`` if nobody."""
        return self._state.vote

    @property
    def leader(self) -> int:
        """Who leads ``term``, as far as it knows; ``NO_NODE`` if it does not."""
        return self._state.leader

    @property
    def voters(self) -> tuple[int, ...]:
        """All voters of the group, of either half while it is joint, ascending."""
        return self._state.membership.voters

    @property
    def members(self) -> Members:
        """Who takes part, as far as this node has applied it."""
        return self._state.membership.members

    @property
    def snapshot(self) -> SnapshotMeta | None:
        """The newest snapshot here, durable or on its way to the disk."""
        return self._state.snapshot

    @property
    def transferee(self) -> int:
        """Whom this leader hands the leadership to at the moment; ``NO_NODE`` if nobody."""
        return self._state.transferee

    @property
    def quiesced(self) -> bool:
        """Whether this node sleeps: it needs no ticks until something comes."""
        return self._state.quiesced

    @property
    def lease_until_us(self) -> int:
        """Until when, on this leader's monotonic clock, reads by lease may be answered; 0 if not at all."""
        return self._state.lease_until_us

    @property
    def votes(self) -> dict[int, bool]:
        """Answers to the (pre-)vote under way: True is granted."""
        return dict(self._state.votes)

    @property
    def hard_state(self) -> HardState:
        """What it must remember over a crash, as it is in memory."""
        return self._state.hard_state

    @property
    def log(self) -> RaftLog:
        """Its log. To look at only."""
        return self._state.log

    @property
    def commit_index(self) -> int:
        """The last entry known to be committed."""
        return self._state.log.commit_index

    @property
    def applied_index(self) -> int:
        """The last entry that the driver reported as applied."""
        return self._state.log.applied_index

    @property
    def persisted_index(self) -> int:
        """The last entry up to which the log is durable here."""
        return self._state.log.persisted_index

    @property
    def last_index(self) -> int:
        """The last entry of the log, durable or not."""
        return self._state.log.last_index

    @property
    def progress(self) -> dict[int, Progress]:
        """What a leader knows of each member, itself included; empty unless it leads. To look at only."""
        return self._state.progress

    @property
    def election_elapsed(self) -> int:
        """Ticks since a follower heard from its leader, or since a leader last checked its quorum."""
        return self._state.election_elapsed

    @election_elapsed.setter
    def election_elapsed(self, ticks: int) -> None:
        self._state.election_elapsed = ticks

    @property
    def randomized_election_timeout(self) -> int:
        """After how many ticks without a leader this node campaigns. Drawn anew with every change of role or term; may
        be set.
        """
        return self._state.randomized_election_timeout

    @randomized_election_timeout.setter
    def randomized_election_timeout(self, ticks: int) -> None:
        self._state.randomized_election_timeout = ticks
