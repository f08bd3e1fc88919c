"""A cluster of real nodes in this process, with a long line before each of them.

A node's endpoint is that of its relay, so all that nodes and clients say to it goes over the line there, and all that it answers
over the line back: between any two nodes lies one delay each way.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marble.config import RaftClusterConfig
from marble.server import RaftServer, create_arrow_flight_transport, create_raft_server
from marble.testing.relay import Line, Relay
from marble.types import Role

WAIT_S = 60.0


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` gives as soon as it is true; for states that nobody announces."""
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come about"
        threading.Event().wait(0.005)
    return found


class FarCluster:
    """Nodes 1 to `nodes`, elected by the time the constructor returns."""

    def __init__(
        self, stack: contextlib.ExitStack, directory: Path, line: Line, nodes: int = 3, ways: int = 1, **settings: Any
    ) -> None:
        self.line = line
        self.directory = directory
        # The relays come first, since their endpoints are in the config; whom they reach is said later.
        self.relays = {
            node: [stack.enter_context(Relay("127.0.0.1:1", there=line, back=line)) for _ in range(ways)]
            for node in range(1, nodes + 1)
        }
        endpoints = {node: ",".join(relay.endpoint for relay in relays) for node, relays in self.relays.items()}
        self.config = RaftClusterConfig("far", endpoints, **settings)
        self.servers: dict[int, RaftServer] = {}
        stack.callback(self.stop)
        for node in self.relays:
            self.start(node)
        wait_until(lambda: self.leader is not None, "a leader")

    def start(self, node: int) -> RaftServer:
        """Start `node`, or start it again."""
        server = create_raft_server(
            create_arrow_flight_transport("127.0.0.1:0"), data_dir=self.directory / str(node), node_id=node
        )
        server.initialize(self.config)
        server.start()
        assert server._flight is not None
        for relay in self.relays[node]:
            relay.retarget(server._flight.endpoint)
        self.servers[node] = server
        return server

    def stop(self) -> None:
        while self.servers:
            self.servers.popitem()[1].stop()

    @property
    def leader(self) -> int | None:
        """Who leads, if all running nodes agree."""
        leading = [node for node, server in self.servers.items() if server.get_role() is Role.LEADER]
        known = {server.get_leader_endpoint() for server in self.servers.values()}
        return leading[0] if len(leading) == len(known) == 1 and None not in known else None
