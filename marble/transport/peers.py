"""Whom a transport talks to: the nodes of its cluster, those that a user has connected it to, and visitors.

Rule 1: this decides which links there are. A link that is no longer wanted is told to stop; nobody waits for it here, but whoever
stops the transport can: `stop` names it until its threads have ended.

Invariants:
- There is a link to a node exactly while somebody has named it, or it has a stream open to this one.
- Where both the cluster and a user say where a node is, the cluster is right.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from marble.errors import ProtocolError, UnavailableError, UsageError
from marble.transport.paths import Peering, addresses_of

VISITORS_MAX: Final = 32
"""Nodes that are answered although nobody has named them."""


class Peers:
    """The links of one node. Thread-safe.

    Parameters
    ----------
    node_id
        Of this node.
    make
        Makes the link to a node, by id and ``host:port``.
    """

    def __init__(self, node_id: int, make: Callable[[int, str], Peering]) -> None:
        self.links: Mapping[int, Peering] = {}
        """By id. Replaced, never changed: it may be read without the lock."""
        self.visitors: dict[int, int] = {}
        """How many streams each node that has one keeps open to this one."""
        self._node_id = node_id
        self._make = make
        self._lock = threading.Lock()
        self._members: dict[int, str] = {}
        self._companions: dict[int, str] = {}
        self._leaving: list[Peering] = []
        self._started = False
        self._stopped = False

    def start(self) -> None:
        """Let the links begin, those of now and of later."""
        with self._lock:
            self._started = True
            links = list(self.links.values())
        for link in links:
            link.start()

    def stop(self) -> tuple[list[Peering], list[Peering]]:
        """Make no more links; returns those that there are, and those that are not wanted any more and may not have ended yet."""
        with self._lock:
            self._stopped = True
            return list(self.links.values()), self._leaving

    def set_members(self, endpoints: Mapping[int, str]) -> None:
        """The nodes of the cluster are these. Nothing happens after `stop`."""
        wanted = {peer: endpoint for peer, endpoint in sorted(endpoints.items()) if peer != self._node_id}
        for endpoint in wanted.values():
            addresses_of(endpoint)
        with self._lock:
            self._members, before = wanted, self._members
            update = self._update(before)
        _carry_out(*update)

    def add(self, peer: int, endpoint: str) -> Peering:
        """A user wants a link to `peer` at `endpoint`; the link there is now. Raises UsageError, and UnavailableError after `stop`."""
        addresses_of(endpoint)
        if peer == self._node_id:
            raise UsageError(f"{peer} is this node itself")
        with self._lock:
            if self._stopped:
                raise UnavailableError(f"the transport of node {self._node_id} has stopped")
            before = dict(self._companions)
            self._companions[peer] = endpoint
            update = self._update(before)
            link = self.links[peer]
        _carry_out(*update)
        return link

    def remove(self, peer: int) -> None:
        """A user wants no link to `peer` any more. Raises UsageError if the cluster does."""
        with self._lock:
            if peer in self._members:
                raise UsageError(f"node {peer} is a member of the cluster: remove it there")
            before = dict(self._companions)
            self._companions.pop(peer, None)
            update = self._update(before)
        _carry_out(*update)

    def _update(self, before: Mapping[int, str]) -> tuple[list[Peering], list[Peering]]:
        """Have the links that are wanted now; which of them are to stop and to start. Called under the lock.

        Who was named before and is not any more is not answered either until it comes anew.
        """
        if self._stopped:
            return [], []
        wanted = {**self._companions, **self._members}
        gone = [
            link
            for peer, link in self.links.items()
            if wanted.get(peer) != link.endpoint and (peer in wanted or peer in before or peer not in self.visitors)
        ]
        self._leave(gone)
        links = {peer: link for peer, link in self.links.items() if link not in gone}
        fresh = []
        for peer, endpoint in wanted.items():
            if peer not in links:
                links[peer] = self._make(peer, endpoint)
                fresh.append(links[peer])
        self.links = links
        return gone, fresh if self._started else []

    def _leave(self, gone: list[Peering]) -> None:
        """These are not wanted any more; the caller tells them to stop. Called under the lock."""
        self._leaving = [link for link in self._leaving if not link.join(0.0)] + gone

    def find(self, peer: int | str) -> Peering | None:
        """The link to a node, by its id or its ``host:port``."""
        if isinstance(peer, int):
            return self.links.get(peer)
        return next((link for link in self.links.values() if peer in (link.endpoint, *link.endpoint.split(","))), None)

    @contextlib.contextmanager
    def visit(self, sender: int, endpoint: str) -> Iterator[None]:
        """While a stream of `sender` is open there is a way back, also if it is none of the peers that this node knows."""
        fresh = None
        with self._lock:
            if sender not in self.links:
                if not endpoint or len(self.visitors) >= VISITORS_MAX:
                    raise ProtocolError(f"node {sender} is not a peer of node {self._node_id}")
                if self._stopped:
                    raise UnavailableError(f"the transport of node {self._node_id} has stopped")
                try:
                    addresses_of(endpoint)
                except UsageError as error:
                    raise ProtocolError(f"the hello of node {sender}: {error}") from None
                fresh = self._make(sender, endpoint)
                self.links = {**self.links, sender: fresh}
            self.visitors[sender] = self.visitors.get(sender, 0) + 1
            link = self.links[sender]
        if fresh is not None:
            fresh.start()
        elif not link.connected:
            # Who comes from there can be reached again, most likely.
            link.poke()
        try:
            yield
        finally:
            gone = None
            with self._lock:
                self.visitors[sender] -= 1
                if not self.visitors[sender]:
                    del self.visitors[sender]
                    if sender not in self._members and sender not in self._companions:
                        gone = self.links.get(sender)
                        self._leave([] if gone is None else [gone])
                        self.links = {peer: link for peer, link in self.links.items() if peer != sender}
            if gone is not None:
                gone.request_stop()


def _carry_out(gone: list[Peering], fresh: list[Peering]) -> None:
    for link in gone:
        link.request_stop()
    for link in fresh:
        link.start()


def host_of(endpoint: str) -> str:
    """The host of ``host:port``. Raises UsageError if it is not of that form."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{endpoint!r} is not an endpoint: expected host:port")
    return host
