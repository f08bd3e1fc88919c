"""What an operator does with a node in this process: members, leadership, snapshots, copies. A part of `marble.server.RaftServer`.

Rule 1: every change ends in a result, or in an error that says whether something was changed.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from marble.actions import check_endpoints
from marble.config import canonical_endpoint
from marble.errors import OutcomeUnknownError
from marble.node import Node
from marble.types import Change, ChangeKind, Transition

T = TypeVar("T")


class Operated(abc.ABC):
    """The operator's part of a server. Thread-safe."""

    @abc.abstractmethod
    def _running(self, what: str) -> Node:
        """The node, which must run; `what` was asked for."""

    def add_node(self, node_id: int, endpoint: str, *, learner: bool = False, timeout_s: float = 10.0) -> int:
        """Add a node that was started with ``join``; like `change_membership`. A learner gets the log and has no vote."""
        kind = ChangeKind.ADD_LEARNER if learner else ChangeKind.ADD_VOTER
        return self.change_membership([Change(kind, node_id)], {node_id: endpoint}, timeout_s=timeout_s)

    def remove_node(self, node_id: int, *, timeout_s: float = 10.0) -> int:
        """Remove a node, this one included; like `change_membership`."""
        return self.change_membership([Change(ChangeKind.REMOVE, node_id)], timeout_s=timeout_s)

    def change_membership(
        self,
        changes: Sequence[Change],
        endpoints: Mapping[int, str] | None = None,
        *,
        transition: Transition = Transition.AUTO,
        timeout_s: float = 10.0,
    ) -> int:
        """Change who takes part, all changes in one step; return the index at which that is committed.

        Parameters
        ----------
        changes
            What to change. None at all: leave a joint group that waits for it.
        endpoints
            ``host:port`` of each node that is new.
        transition
            Whether, and for how long, two majorities decide (Raft §6).
        timeout_s
            How long to wait, in seconds.

        Raises
        ------
        NotLeaderError
            If this node does not lead; it names the leader. Nothing was changed.
        UnavailableError
            If another change is under way, or this leader has just begun. Nothing was changed: retry.
        OutcomeUnknownError
            If it was not decided in time: look at `get_members`.
        UsageError
            If the changes make no sense.
        """
        node = self._running("change_membership")
        places = {each: canonical_endpoint(where) for each, where in (endpoints or {}).items()}
        check_endpoints(changes, places, node.endpoints)
        return wait_for(node.change_membership(changes, places, transition), timeout_s, "the change").index

    def transfer_leadership(self, to: int, timeout_s: float = 10.0) -> None:
        """Let voter `to` lead; returns when it does.

        Raises
        ------
        NotLeaderError
            If this node does not lead; it names the leader.
        UsageError
            If `to` is no voter.
        UnavailableError
            If `to` did not take over within an election timeout; this node leads on.
        """
        wait_for(self._running("transfer_leadership").transfer_leadership(to), timeout_s, "the transfer")

    def forget_leader(self) -> None:
        """Let this follower be free to vote at once, when somebody knows better than its timer that its leader is gone."""
        wait_for(self._running("forget_leader").forget_leader(), 10.0, "forgetting the leader")

    def take_snapshot(self, timeout_s: float = 600.0) -> int:
        """Write a snapshot of this node's state now and forget the log behind it; return the index that it covers.

        Raises UnavailableError if it could not be written now.
        """
        return wait_for(self._running("take_snapshot").snapshot(), timeout_s, "the snapshot")

    def checkpoint(self, path: str | os.PathLike[str]) -> int:
        """Copy what this node has on its disk, by links, in milliseconds, while it goes on; returns the bytes in the copy.

        `path` is a new directory on the file system of the data directory. ``marble restore`` makes a node of a new cluster
        of it. Raises UsageError if it exists or cannot be made.
        """
        return self._running("checkpoint").checkpoints.place(path)


def wait_for(future: Future[T], timeout_s: float, what: str) -> T:
    """The result of `future`. Raises OutcomeUnknownError if `what` has none after `timeout_s` seconds."""
    try:
        return future.result(timeout_s)
    except TimeoutError:
        raise OutcomeUnknownError(f"{what} was not decided in {timeout_s} s: it may still be") from None
