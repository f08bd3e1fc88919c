"""What the benchmarks share.

Every group holds a figure and its floor, measured in the same run: pytest-benchmark prints each median's multiple of the smallest in its
group in brackets, which is the ratio to look at. Absolute times mean little on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from marble.demo.processes import NodeProcess, Nodes, running_on_free_ports, serve_command

CONFIG = """
[node]
id = {node}
data_dir = "{directory}"
[cluster]
cluster_id = "bench"
node_endpoints = {endpoints}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-rows", type=int, default=2000, help="rows in the benchmarks beside other stores (default: 2000)"
    )


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory on the disk that is measured; ``--basetemp`` chooses which."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="session")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three nodes as processes of their own, on loopback, durable."""
    base = tmp_path_factory.mktemp("cluster")
    endpoints: list[str] = []

    def make(ports: object) -> Nodes:
        endpoints[:] = [f"127.0.0.1:{port}" for port in ports]
        processes = {}
        for node in (1, 2, 3):
            config = base / f"node-{node}.toml"
            config.write_text(CONFIG.format(node=node, directory=base / f"node-{node}", endpoints=endpoints))
            processes[node] = NodeProcess(f"node {node}", serve_command(config), base / f"node-{node}.log")
        return Nodes(processes)

    with running_on_free_ports(3, make):
        yield "grpc://" + ",".join(endpoints)
