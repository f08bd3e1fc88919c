"""Majorities: which index a majority holds, and whether a vote is decided.

Rule 1: pure functions of what the voters said; nothing here knows of nodes, terms or logs. Joint consensus (Raft §6) asks
two sets of voters the same questions and takes the smaller answer.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping

from marble.errors import check


class VoteResult(enum.Enum):
    """How a vote stands."""

    PENDING = "pending"
    WON = "won"
    LOST = "lost"


def quorum_size(voters: int) -> int:
    """How many of `voters` make a majority."""
    return voters // 2 + 1


def majority_index(voters: Collection[int], indexes: Mapping[int, int]) -> int:
    """The largest index that a majority of `voters` has reached; a voter that `indexes` lacks has reached 0."""
    check(len(voters) > 0, "a quorum of nobody")
    reached = sorted((indexes.get(voter, 0) for voter in voters), reverse=True)
    return reached[quorum_size(len(voters)) - 1]


def vote_result(voters: Collection[int], votes: Mapping[int, bool]) -> VoteResult:
    """Whether `votes` (True: granted) decide the matter among `voters`. Votes of others do not count."""
    check(len(voters) > 0, "a vote of nobody")
    granted = sum(1 for voter in voters if votes.get(voter) is True)
    rejected = sum(1 for voter in voters if votes.get(voter) is False)
    if granted >= quorum_size(len(voters)):
        return VoteResult.WON
    if len(voters) - rejected < quorum_size(len(voters)):
        return VoteResult.LOST
    return VoteResult.PENDING


def joint_index(voters: Collection[int], outgoing: Collection[int], indexes: Mapping[int, int]) -> int:
    """The largest index that a majority of `voters` and, if there are any, one of `outgoing` have reached."""
    index = majority_index(voters, indexes)
    return min(index, majority_index(outgoing, indexes)) if outgoing else index


def joint_vote(voters: Collection[int], outgoing: Collection[int], votes: Mapping[int, bool]) -> VoteResult:
    """Whether `votes` decide the matter in both halves: lost in one is lost."""
    results = {vote_result(voters, votes)}
    if outgoing:
        results.add(vote_result(outgoing, votes))
    if VoteResult.LOST in results:
        return VoteResult.LOST
    return VoteResult.PENDING if VoteResult.PENDING in results else VoteResult.WON
