"""Fixtures: a cluster for a module's harmless tests, and one for each test that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server.cluster import Cluster


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three servers that a module's tests share: each uses a table of its own and leaves the servers as they are."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), max_entry_size=256 * 1024, append_bytes_max=256 * 1024)
    yield cluster
    cluster.stop()


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes a cluster of the test's own."""
    made: list[Cluster] = []

    def make(nodes: int = 3, **settings: Any) -> Cluster:
        made.append(Cluster(tmp_path / str(len(made)), nodes, **settings))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()


@pytest.fixture(params=["leader", "follower"])
def node(request: pytest.FixtureRequest, shared: Cluster) -> int:
    """The node that a client asks: the answer must be the same."""
    return shared.leader() if request.param == "leader" else shared.follower()


@pytest.fixture
def table(request: pytest.FixtureRequest, shared: Cluster) -> str:
    """A new table of `SCHEMA` in the shared cluster."""
    name = "".join(character if character.isalnum() else "_" for character in request.node.name)
    shared.create_table(name)
    return name
