"""A cluster as its operator sees it: who takes part, who leads, what is kept.

Rule 1: what an operator asks for is sent again only after a refusal. A lost answer is an `OutcomeUnknownError`, after which
`ClusterAdmin.members` tells what came of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from marble.client import ClientOptions, RemoteBackend
from marble.config import parse_url
from marble.errors import ProtocolError
from marble.transport.papers import credentials_for
from marble.transport.wire import encode_json
from marble.types import Change, Members, Transition


@dataclass(frozen=True, slots=True)
class Membership:
    """Who takes part in a cluster, and where they are found (``host:port`` by node)."""

    members: Members
    endpoints: Mapping[int, str]

    @property
    def parts(self) -> dict[int, str]:
        """What each node is, ascending: voter, learner, joining (a voter of the next group only) or leaving."""
        members = self.members
        parts = {}
        for node in members.all:
            if node in members.learners:
                parts[node] = "learner"
            elif node in members.learners_next:
                parts[node] = "leaving, then learner"
            elif node not in members.voters:
                parts[node] = "leaving"
            else:
                parts[node] = "joining" if members.joint and node not in members.outgoing else "voter"
        return parts


class ClusterAdmin:
    """The operator's side of a cluster. A context manager: leaving it closes it. Thread-safe.

    Parameters
    ----------
    url
        ``grpc://host:port,host:port,…``, or ``grpc+tls://…``: one or more nodes of it. Who calls is in the environment
        (`marble.transport.papers`).
    timeout_s
        How long a call may take, in seconds, finding a leader included.
    """

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        self._given = parse_url(url)
        self._backend = RemoteBackend(self._given, ClientOptions(timeout_s, credentials_for(url)))

    def members(self, *, consistency: str = "linearizable") -> Membership:
        """Who takes part.

        Parameters
        ----------
        consistency
            "linearizable", or "local": as the node that answers knows it, also while no majority can be reached.
        """
        answer = self._backend.ask("members", encode_json({"consistency": consistency}))
        try:
            parts = {
                name: tuple(sorted(map(int, answer[name])))
                for name in ("voters", "outgoing", "learners", "learners_next")
            }
            endpoints = {int(node): str(endpoint) for node, endpoint in answer["endpoints"].items()}
            return Membership(Members(**parts, auto_leave=bool(answer["auto_leave"])), endpoints)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"an answer does not say who takes part: {error!r}") from None

    def change_membership(
        self,
        changes: Sequence[Change],
        endpoints: Mapping[int, str] | None = None,
        transition: Transition = Transition.AUTO,
    ) -> int:
        """Change who takes part; returns the index at which that is committed.

        Parameters
        ----------
        changes
            In one step. None at all: leave a joint group that waits for it.
        endpoints
            Where nodes that are new are found.
        transition
            See `Transition`.

        Raises
        ------
        UsageError
            If the changes make no sense: an unknown node removed, the last voter removed, a new node without a place.
        UnavailableError
            If another change was under way for the whole time. Nothing was changed.
        OutcomeUnknownError
            If the answer was lost: look at `members`.
        """
        places = endpoints or {}
        body: list[dict[str, Any]] = [
            {"kind": change.kind.value, "node": change.node}
            | ({"endpoint": places[change.node]} if change.node in places else {})
            for change in changes
        ]
        asked = encode_json({"changes": body, "transition": transition.value})
        return _whole(self._backend.order("change_membership", asked), "index")

    def transfer_leadership(self, to: int) -> None:
        """Let voter `to` lead. Returns when it does.

        Raises
        ------
        UsageError
            If `to` is no voter.
        UnavailableError
            If it could not take over in time; the leader goes on.
        """
        self._backend.order("transfer_leadership", encode_json({"to": to}))

    def take_snapshots(self) -> dict[str, int]:
        """Let each node of the URL write a snapshot now; the index that each covers, by endpoint."""
        return {endpoint: _whole(self._backend.ask_one(endpoint, "snapshot", b""), "index") for endpoint in self._given}

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._backend.close()

    def __enter__(self) -> ClusterAdmin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _whole(answer: Mapping[str, Any], name: str) -> int:
    value = answer.get(name)
    if not isinstance(value, int):
        raise ProtocolError(f"an answer has no {name}")
    return value
