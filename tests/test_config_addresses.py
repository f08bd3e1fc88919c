"""Nodes with several addresses, and the limits of the way between nodes, as a config says them."""

from __future__ import annotations

from pathlib import Path

import pytest

from marble.config import ADDRESSES_MAX, NodeConfig, RaftClusterConfig, canonical_endpoint, parse_config
from marble.errors import UsageError

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
