"""A cluster with encryption, tokens and a secret: clients may what their token says, at whichever node they ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl
import pytest
from server.cluster import free_endpoints
from transport.pki import Files, authority

import marble
from marble.config import RaftClusterConfig, SecurityConfig
from marble.errors import ForbiddenError, UnauthenticatedError, UnavailableError
from marble.transport import wire
from marble.transport.papers import credentials_for

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), ("name", pa.string())])
ADMIN, WRITER, READER = "admin-0123456789", "writer-0123456789", "reader-0123456789"
TOKENS = f"""
[tokens.ops]
token = "{ADMIN}"
access = "admin"
[tokens.etl]
token = "{WRITER}"
access = "write"
tables = ["mine"]
[tokens.board]
token = "{READER}"
access = "read"
tables = ["m*"]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[marble.RaftServer], str, Path]]:
    directory = tmp_path_factory.mktemp("secure")
    config = RaftClusterConfig(
        "secure",
        free_endpoints(3),
        enable_ssl=True,
        election_timeout_ms=1000,
        heartbeat_interval_ms=100,
    )
    servers = []
    for number in (1, 2, 3):
        (directory / f"files-{number}").mkdir()
        files = Files(directory / f"files-{number}")
        security = SecurityConfig(files.node(), files.tokens(TOKENS), files.secret())
        server = marble.create_raft_server(data_dir=directory / f"node-{number}", node_id=number, security=security)
        server.initialize(config)
        servers.append(server)
    for server in servers:
        server.start()
    ca = directory / "ca.pem"
    ca.write_bytes(authority()[0])
    url = "grpc+tls://" + ",".join(config.endpoints.values())
    try:
        with marble.connect(url, token=ADMIN, tls_ca=ca) as database:
            for name in ("mine", "more", "other"):
                database.create_table(name, SCHEMA, key=["id"]).write(pa.record_batch([[1], [name]], schema=SCHEMA))
        yield servers, url, ca
    finally:
        for server in servers:
            server.stop()


def follower_of(servers: list[marble.RaftServer]) -> marble.RaftServer:
    end = time.monotonic() + 30
    pause = threading.Event()
    while time.monotonic() < end:
        found = [server for server in servers if server.get_leader_endpoint() not in (None, server.endpoint)]
        if found:
            return found[0]
        pause.wait(0.01)
    raise AssertionError("no follower")


def test_each_may_what_its_token_says(cluster: Any) -> None:
    _, url, ca = cluster
    batch = pa.record_batch([[2], ["two"]], schema=SCHEMA)
    with marble.connect(url, token=WRITER, tls_ca=ca) as etl:
        assert {table.name for table in etl.tables()} == {"mine"}
        etl.table("mine").write(batch)
        assert etl.table("mine").scan().to_table().num_rows == 2
        with pytest.raises(ForbiddenError, match="'etl' has write access to mine, and this call needs admin access"):
            etl.create_table("yours", SCHEMA, key=["id"])
        with pytest.raises(ForbiddenError):
            etl.drop_table("mine")
    with marble.connect(url, token=READER, tls_ca=ca) as board:
        assert {table.name for table in board.tables()} == {"mine", "more"}
        assert board.table("more").get({"id": 1}) is not None
        with pytest.raises(ForbiddenError):
            board.table("more").write(batch)


@pytest.mark.parametrize("relayed", [False, True])
def test_a_node_lends_nobody_its_own_rights(cluster: Any, relayed: bool) -> None:
    servers, _, ca = cluster
    follower = follower_of(servers)
    endpoint = follower.endpoint if relayed else follower.get_leader_endpoint()
    assert endpoint is not None

    def act(token: str, name: str, body: bytes) -> bytes:
        made = wire.connect(endpoint, credentials_for("grpc+tls://h:1", token, tls_ca=ca))
        with made:
            (answer,) = made.do_action(fl.Action(name, body), fl.FlightCallOptions(timeout=30))
            return bytes(answer.body.to_pybytes())

    assert b"index" in act(ADMIN, "propose", b"operation")
    for token, name, body in [
        (WRITER, "propose", b"operation"),
        (WRITER, "drop_table", b'{"name": "mine"}'),
        (READER, "open_session", b""),
        (WRITER, "transfer_leadership", b'{"to": 1}'),
        (WRITER, "snapshot", b""),
        (WRITER, "begin_backup", b""),
    ]:
        with pytest.raises(fl.FlightUnauthorizedError, match="ask the operator"):
            act(token, name, body)


def test_a_stream_of_writes_is_relayed_with_its_client_s_rights(cluster: Any) -> None:
    servers, _, ca = cluster
    endpoint = follower_of(servers).endpoint
    batch = pa.record_batch([[7], ["seven"]], schema=SCHEMA)
    for table, token, good in [("mine", WRITER, True), ("more", WRITER, False), ("mine", READER, False)]:
        with wire.connect(endpoint, credentials_for("grpc+tls://h:1", token, tls_ca=ca)) as made:
            writer, reader = made.do_put(fl.FlightDescriptor.for_path(table), SCHEMA, fl.FlightCallOptions(timeout=30))
            if good:
                writer.write_batch(batch)
                assert wire.decode_ack(reader.read()).error_code is None
                writer.close()
            else:
                with pytest.raises((fl.FlightUnauthorizedError, pa.ArrowException, OSError)):  # noqa: PT012
                    writer.write_batch(batch)
                    reader.read()
                    writer.close()


def test_strangers_are_told_at_once_what_is_missing(cluster: Any) -> None:
    _, url, ca = cluster
    with marble.connect(url, tls_ca=ca) as nobody, pytest.raises(UnauthenticatedError, match="wants a token: connect"):
        nobody.tables()
    with marble.connect(url, tls_ca=ca) as nobody, pytest.raises(UnauthenticatedError):
        nobody.create_table("t", SCHEMA, key=["id"])
    with (
        marble.connect(url, token="x" * 20, tls_ca=ca) as nobody,
        pytest.raises(UnauthenticatedError, match="is wrong"),
    ):
        nobody.tables()
    plain = url.replace("grpc+tls", "grpc")
    with (
        marble.connect(plain, token=ADMIN, timeout_s=1.0) as nobody,
        pytest.raises(UnavailableError, match="may want encryption"),
    ):
        nobody.tables()
