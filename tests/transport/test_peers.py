"""Which links a transport has, and that none is forgotten before its threads have ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from marble.transport.paths import Peering
from marble.transport.peers import Peers


class Thread:
    """Of a link: it ends when the test says so."""

    def __init__(self, peer: int, endpoint: str) -> None:
        self.peer = peer
        self.endpoint = endpoint
        self.stopping = False
        self.ended = False
        self.connected = True

    def start(self) -> None:
        pass

    def request_stop(self) -> None:
        self.stopping = True

    def join(self, timeout_s: float) -> bool:
        assert timeout_s == 0.0  # Nobody waits here.
        return self.ended


def leave_cluster(peers: Peers) -> None:
    peers.set_members({2: "b:1"})
    peers.set_members({})


def leave_user(peers: Peers) -> None:
    peers.add(2, "b:1")
    peers.remove(2)


def leave_as_visitor(peers: Peers) -> None:
    with peers.visit(2, "b:1"):
        pass


def move(peers: Peers) -> None:
    peers.set_members({2: "b:1"})
    peers.set_members({2: "c:1"})


@pytest.mark.parametrize("leave", [leave_cluster, leave_user, leave_as_visitor, move])
def test_a_link_that_is_not_wanted_is_named_until_it_has_ended(leave: Callable[[Peers], None]) -> None:
    made: list[Thread] = []

    def make(peer: int, endpoint: str) -> Peering:
        made.append(Thread(peer, endpoint))
        return cast(Any, made[-1])

    peers = Peers(1, make)
    peers.start()
    leave(peers)
    old = made[0]
    assert old.stopping
    assert old not in peers.links.values()
    leave(peers)
    second = next(link for link in made[1:] if link.stopping)
    old.ended = True
    leave(peers)
    _, leaving = peers.stop()
    assert old not in leaving
    assert second in leaving
    assert all(link.stopping for link in cast(list[Thread], leaving))
