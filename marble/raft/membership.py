"""Who takes part. Today: a fixed set of voters.

The seam for what comes later: every question about the group ("who votes", "whom do we replicate to", "what is
committed") is asked here and nowhere else, so learners and joint consensus (Raft §6) change this file and not its
callers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from marble.errors import UsageError
from marble.raft import quorum
from marble.raft.quorum import VoteResult
from marble.types import NODE_ID_MAX


class Membership:
    """The voters of a group. Never changes once made.

    - ``voters`` is not empty, has no duplicate, and is in ascending order: peers are always visited in that order.
    """

    __slots__ = ("voters",)

    def __init__(self, voters: Iterable[int]) -> None:
        given = list(voters)
        self.voters: tuple[int, ...] = tuple(sorted(set(given)))
        if not self.voters:
            raise UsageError("a group needs at least one voter")
        if len(self.voters) != len(given):
            raise UsageError(f"a voter is named twice in {given}")
        if not 1 <= self.voters[0] <= self.voters[-1] <= NODE_ID_MAX:
            raise UsageError(f"voters {given} are not all within 1 to {NODE_ID_MAX}")

    def is_voter(self, node: int) -> bool:
        """Whether `node` votes and may lead."""
        return node in self.voters

    def is_member(self, node: int) -> bool:
        """Whether `node` belongs to the group in any capacity."""
        return node in self.voters

    def peers(self, node: int) -> list[int]:
        """All to whom `node` replicates when it leads."""
        return [voter for voter in self.voters if voter != node]

    def majority_index(self, indexes: Mapping[int, int]) -> int:
        """The largest index that a quorum has reached."""
        return quorum.majority_index(self.voters, indexes)

    def vote_result(self, votes: Mapping[int, bool]) -> VoteResult:
        """How `votes` stand."""
        return quorum.vote_result(self.voters, votes)
