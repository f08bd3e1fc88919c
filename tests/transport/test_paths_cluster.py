"""Real nodes with two addresses each: a network that dies costs no leader, and no write."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from transport.wan_support import FarCluster, wait_until

import marble
from marble.testing.relay import Line

SCHEMA = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.string())])
HEARTBEAT_MS = 400


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def rows(first: int) -> pa.RecordBatch:
    return pa.record_batch({"k": [first, first + 1], "v": ["a", "b"]}, schema=SCHEMA)


def test_a_network_that_dies_costs_no_leader(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    cluster = FarCluster(
        stack, tmp_path, Line(), ways=2, heartbeat_interval_ms=HEARTBEAT_MS, election_timeout_ms=5 * HEARTBEAT_MS
    )
    leader = wait_until(lambda: cluster.leader, "a leader")
    server = cluster.servers[leader]
    table = server.database.create_table("t", SCHEMA, key=["k"])
    term = server.get_cluster_status()["term"]
    links = [link for each in cluster.servers.values() for link in each._flight._peers.links.values()]
    assert len(links) == 6
    wait_until(lambda: all(answers for link in links for _, answers, _ in link.states()), "all ways")
    others = [node for node in cluster.servers if node != leader]
    sent = [server._flight.metrics.counter("transport_messages_sent", peer=node) for node in others]
    for network in (0, 1):
        for relays in cluster.relays.values():
            relays[network].set(there=Line(silent=True), back=Line(silent=True))
        wait_until(lambda network=network: not any(link.states()[network][1] for link in links), "silence")
        for at in range(5):
            table.write(rows(10 * at))
        # More than an election timeout of nothing but heartbeats would show who does not hear the leader.
        heartbeats = [each.value + 2 * 5 for each in sent]
        wait_until(
            lambda heartbeats=heartbeats: all(
                each.value >= least for each, least in zip(sent, heartbeats, strict=True)
            ),
            "heartbeats",
        )
        assert server.get_cluster_status()["term"] == term
        assert cluster.leader == leader
        for relays in cluster.relays.values():
            relays[network].set(there=Line(), back=Line())
        wait_until(lambda: all(answers for link in links for _, answers, _ in link.states()), "all ways again")


def test_a_client_that_knows_one_network_writes_over_it_while_the_other_is_dead(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    cluster = FarCluster(stack, tmp_path, Line(), ways=2)
    server = cluster.servers[wait_until(lambda: cluster.leader, "a leader")]
    server.database.create_table("t", SCHEMA, key=["k"])
    for relays in cluster.relays.values():
        relays[0].refuse()
        relays[0].reset()
    second = ",".join(relays[1].endpoint for relays in cluster.relays.values())
    database = stack.enter_context(marble.connect(f"grpc://{second}"))
    database.table("t").write(rows(1))
    assert database.table("t").get(1) is not None


def test_large_writes_of_one_table_take_both_networks_and_outlive_one(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    limited = Line(bytes_per_s=24.0 * 2**20)
    cluster = FarCluster(
        stack, tmp_path, limited, ways=2, heartbeat_interval_ms=HEARTBEAT_MS, election_timeout_ms=5 * HEARTBEAT_MS
    )
    leader = cluster.servers[wait_until(lambda: cluster.leader, "a leader")]
    assert leader._flight is not None
    schema = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.binary())])
    table = leader.database.create_table("t", schema, key=["k"])
    noise = random.Random(3).randbytes(2**21)
    written = 0

    def write(count: int) -> None:
        nonlocal written
        futures = []
        for _ in range(count):
            value = noise[written : written + 2**20]
            futures.append(table.write_async(pa.record_batch({"k": [written], "v": [value]}, schema=schema)))
            written += 1
        for future in futures:
            future.result(60.0)

    metrics = leader._flight.metrics

    def used() -> bool:
        return all(
            metrics.counter("transport_parts_bytes_sent", peer=link.peer, way=way).value > 0
            for link in leader._flight._peers.links.values()
            for way in (0, 1)
        )

    for _ in range(20):
        write(16)
        if used():
            break
    assert used()
    for relays in cluster.relays.values():
        relays[1].set(there=Line(silent=True), back=Line(silent=True))
    write(16)
    for server in cluster.servers.values():
        mine = server.database.table("t")
        wait_until(lambda mine=mine: mine.count_rows(consistency="local") == written, "all rows")
        rows = mine.scan(consistency="local").to_table()
        for key, value in zip(rows["k"].to_pylist(), rows["v"].to_pylist(), strict=True):
            assert value == noise[key : key + 2**20]
