"""Nodes with several addresses, and the limits of the way between nodes, as a config says them."""

from __future__ import annotations

from pathlib import Path

import pytest

from marble.config import (
    ADDRESSES_MAX,
    NodeConfig,
    RaftClusterConfig,
    TransportConfig,
    canonical_endpoint,
    parse_config,
)
from marble.errors import UsageError
from marble.transport.wan import options_for

TWO = ("10.0.0.1:5001, 10.1.0.1:5001", "10.0.0.2:5001,10.1.0.2:5001")


def test_a_node_may_have_several_addresses() -> None:
    config = RaftClusterConfig("c", TWO)
    assert dict(config.endpoints) == {1: "10.0.0.1:5001,10.1.0.1:5001", 2: "10.0.0.2:5001,10.1.0.2:5001"}
    assert config.find_node("10.1.0.2:5001") == 2
    assert config.find_node("10.0.0.1:5001,10.1.0.1:5001") == 1


@pytest.mark.parametrize(
    ("endpoints", "words"),
    [
        (("a:1,a:1",), "twice"),
        (("a:1,b:1", "c:1,b:1"), "number 1 has already"),
        ((",".join(f"h{n}:1" for n in range(ADDRESSES_MAX + 1)),), "at most 4"),
        (("a:1,",), "has no port"),
        (("a:1,b:0",), "port '0'"),
    ],
)
def test_wrong_addresses_are_refused(endpoints: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        RaftClusterConfig("c", endpoints)


def test_a_node_with_several_addresses_says_where_it_listens() -> None:
    cluster = RaftClusterConfig("c", TWO)
    with pytest.raises(UsageError, match=r"\[node\] listen is missing"):
        NodeConfig(1, Path("x"), cluster)
    assert NodeConfig(1, Path("x"), cluster, listen="0.0.0.0:5001").listen_endpoint == "0.0.0.0:5001"
    text = '[node]\ndata_dir = "x"\nendpoint = "10.1.0.1:5001"\nlisten = "[::]:5001"\n[cluster]\ncluster_id = "c"\n'
    assert parse_config(f"{text}node_endpoints = {list(TWO)}\n", Path()).id == 1


@pytest.mark.parametrize("text", ["h:1", "H:1,[::1]:2", "10.0.0.1:5001,10.1.0.1:5001"])
def test_the_canonical_form_stays(text: str) -> None:
    once = canonical_endpoint(text)
    assert canonical_endpoint(once) == once == text.lower()


def test_the_way_between_nodes_has_a_profile_and_keys_that_override_it() -> None:
    lan, wan = TransportConfig(), TransportConfig("wan", queue_bytes_max=2**20)
    assert lan.connect_timeout_ms == 1000
    assert wan.connect_timeout_ms == 5000
    assert wan.queue_bytes_max == 2**20
    text = '[node]\ndata_dir = "x"\nid = 1\n[cluster]\ncluster_id = "c"\nnode_endpoints = ["h:1"]\n'
    cluster = parse_config(f'{text}[cluster.transport]\nprofile = "wan"\ncompression = "off"\n', Path()).cluster
    options = options_for(cluster.transport, heartbeat_ms=400, election_ms=2000, entry_bytes_max=7)
    assert (options.connect_timeout_s, options.ping_s, options.answer_s) == (5.0, 0.1, 0.2)
    assert (options.round_trip_max_s, options.compression, options.entry_bytes_max) == (0.2, "off", 7)
    # A dead way is left within a heartbeat.
    assert options.ping_s + options.answer_s < 0.4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('profile = "man"', 'must be "lan" or "wan"'),
        ("profile = 3", "profile must be"),
        ("connect_timeout_ms = 1", "connect_timeout_ms"),
        ("silent_peer_ms = 0", "silent_peer_ms"),
        ("queue_bytes_max = 1", "queue_bytes_max"),
        ("snapshot_window_bytes_max = 0", "snapshot_window_bytes_max"),
        ('compression = "gzip"', "compression must be one of"),
        ("speed = 1", "speed"),
    ],
)
def test_a_wrong_way_is_refused_by_name(line: str, words: str) -> None:
    text = '[node]\ndata_dir = "x"\nid = 1\n[cluster]\ncluster_id = "c"\nnode_endpoints = ["h:1"]\n'
    with pytest.raises(UsageError, match=words):
        parse_config(f"{text}[cluster.transport]\n{line}\n", Path())
