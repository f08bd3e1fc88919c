"""Configs: what is right is taken as it stands, and whatever is wrong is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from marble.config import (
    NodeConfig,
    RaftClusterConfig,
    format_endpoint,
    load_config,
    parse_config,
    parse_endpoint,
    parse_url,
)
from marble.errors import UsageError

THREE = ["127.0.0.1:5001", "127.0.0.1:5002", "127.0.0.1:5003"]

GOOD = """
[node]
id = 2
data_dir = "data/two"
listen = "0.0.0.0:5002"

[cluster]
cluster_id = "orders"
node_endpoints = ["127.0.0.1:5001", "127.0.0.1:5002", "127.0.0.1:5003"]
election_timeout_ms = 1000
heartbeat_interval_ms = 150
max_entry_size = 1048576
"""


def test_defaults_are_those_that_users_of_marbledb_know() -> None:
    config = RaftClusterConfig("orders", THREE)
    assert (config.election_timeout_ms, config.heartbeat_interval_ms, config.snapshot_distance) == (1500, 300, 10_000)
    assert (config.max_log_size, config.max_entry_size) == (None, 16 * 2**20)
    assert (config.enable_pre_vote, config.enable_ssl) == (True, False)


def test_a_list_of_endpoints_numbers_the_nodes_from_one() -> None:
    config = RaftClusterConfig("orders", THREE)
    assert dict(config.endpoints) == {1: THREE[0], 2: THREE[1], 3: THREE[2]}
    assert config.voters == (1, 2, 3)
    assert config.find_node("127.0.0.1:5003") == 3


def test_a_mapping_of_endpoints_keeps_its_ids_in_ascending_order() -> None:
    config = RaftClusterConfig("orders", {7: "b:2", 3: "A:1"})
    assert list(config.endpoints.items()) == [(3, "a:1"), (7, "b:2")]


def test_a_config_does_not_change_with_the_list_that_it_was_made_of() -> None:
    given = list(THREE)
    config = RaftClusterConfig("orders", given)
    given.clear()
    assert list(config.node_endpoints) == THREE
    with pytest.raises(TypeError):
        config.endpoints[4] = "x:1"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cluster_id = "other"  # type: ignore[misc]


def test_replace_checks_again() -> None:
    config = RaftClusterConfig("orders", THREE)
    assert dataclasses.replace(config, max_entry_size=8192).max_entry_size == 8192
    assert dict(dataclasses.replace(config, node_endpoints={5: "h:1"}).endpoints) == {5: "h:1"}
    with pytest.raises(UsageError, match="max_entry_size"):
        dataclasses.replace(config, max_entry_size=1)


@pytest.mark.parametrize(("election", "heartbeat"), [(1500, 300), (601, 300), (21, 10), (1000, 150), (600_000, 10)])
def test_ticks_cover_the_times_asked_for(election: int, heartbeat: int) -> None:
    config = RaftClusterConfig("orders", THREE, election_timeout_ms=election, heartbeat_interval_ms=heartbeat)
    assert config.heartbeat_ticks * config.tick_ms == pytest.approx(heartbeat)
    assert election <= config.election_ticks * config.tick_ms < election + config.tick_ms + 1e-6
    assert config.election_ticks > 2 * config.heartbeat_ticks


def test_a_message_may_hold_a_full_append_or_one_large_entry() -> None:
    small = RaftClusterConfig("orders", THREE, max_entry_size=4096, append_bytes_max=1000)
    assert small.message_bytes_max == 4096
    assert dataclasses.replace(small, append_bytes_max=9000).message_bytes_max == 9000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster_id": ""}, "cluster_id"),
        ({"cluster_id": "a b"}, "cluster_id"),
        ({"cluster_id": "../x"}, "cluster_id"),
        ({"cluster_id": 5}, "cluster_id must be .* int 5"),
        ({"node_endpoints": []}, "names 0 nodes"),
        ({"node_endpoints": [f"h:{port}" for port in range(1, 33)]}, "names 32 nodes"),
        ({"node_endpoints": "127.0.0.1:5001"}, "must be a list"),
        ({"node_endpoints": None}, "must be a list"),
        ({"node_endpoints": ["a:1", "b:2", "A:1"]}, "number 3 is 'a:1', which number 1 has"),
        ({"node_endpoints": ["a:1", 5]}, "number 2 must be a string"),
        ({"node_endpoints": {0: "a:1"}}, "node id .* is 0"),
        ({"node_endpoints": {True: "a:1"}}, "node id .* bool True"),
        ({"node_endpoints": {1: "a:1", 2: "a:1"}}, "which number 1 has"),
        ({"election_timeout_ms": 600}, "above twice heartbeat_interval_ms 300.* make it 1500"),
        ({"election_timeout_ms": 1500.0}, "election_timeout_ms must be a whole number, not float"),
        ({"heartbeat_interval_ms": 0}, "heartbeat_interval_ms is 0"),
        ({"heartbeat_interval_ms": True}, "heartbeat_interval_ms must be a whole number, not bool"),
        ({"max_entry_size": "16 MiB"}, "max_entry_size must be a whole number, not str"),
        ({"max_entry_size": 2**30 + 1}, "max_entry_size is 1073741825"),
        ({"max_log_size": 0}, "max_log_size is 0"),
        ({"max_log_size": 4096}, "max_log_size 4096 must not be below max_entry_size"),
        ({"uncommitted_bytes_max": 4096}, "uncommitted_bytes_max 4096 must not be below max_entry_size"),
        ({"inflight_bytes_max": 1}, "inflight_bytes_max 1 must not be below append_bytes_max"),
        ({"inflight_messages_max": 0}, "inflight_messages_max is 0"),
        ({"append_bytes_max": 0}, "append_bytes_max is 0"),
        ({"segment_bytes_max": 1}, "segment_bytes_max is 1"),
        ({"cache_bytes_max": -1}, "cache_bytes_max is -1"),
        ({"enable_pre_vote": 1}, "enable_pre_vote must be true or false, not int"),
        ({"enable_ssl": "no"}, "enable_ssl must be true or false"),
        ({"lease_reads": "on"}, "lease_reads must be true or false, not str 'on'"),
        ({"snapshot_distance": 0}, "snapshot_distance is 0: it must be within 1"),
        ({"snapshot_distance": 1e4}, "snapshot_distance must be a whole number, not float"),
    ],
)
def test_a_wrong_value_is_refused_by_name(changes: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"cluster_id": "orders", "node_endpoints": THREE, **changes}
    with pytest.raises(UsageError, match=words):
        RaftClusterConfig(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:5001", "127.0.0.1", 5001),
        ("Node-1.Example.org:1", "node-1.example.org", 1),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:5001", "fe80::1%eth0", 5001),
        ("db_1:05001", "db_1", 5001),
    ],
)
def test_an_endpoint_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert parse_endpoint(text) == (host, port)
    assert parse_endpoint(format_endpoint(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no port"),
        ("localhost", 'no port.*"localhost:5001"'),
        (":5001", "no valid host"),
        ("host:", "port ''"),
        ("host:0", "from 1 to 65535"),
        ("host:65536", "65536"),
        ("host:-1", "-1"),
        ("host:+1", "'\\+1'"),
        ("host:1e3", "1e3"),
        ("host:٣", "not a number"),
        ("host:" + "1" * 5000, "not a number"),
        ("::1:5001", "brackets"),
        ("[::1:5001", "brackets"),
        ("[localhost]:5001", "no valid host"),
        ("a b:5001", "no valid host"),
        ("a/b:5001", "no valid host"),
        ("a\n:5001", "no valid host"),
        ("-x:5001", "no valid host"),
        ("grpc://host:5001", "without a scheme"),
        (5001, "int 5001"),
        (None, "None"),
    ],
)
def test_a_malformed_endpoint_is_refused_with_what_to_write(text: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_endpoint(text)


def test_port_zero_is_only_for_listening() -> None:
    assert parse_endpoint("127.0.0.1:0", free_port=True) == ("127.0.0.1", 0)
    with pytest.raises(UsageError, match="port '0'"):
        RaftClusterConfig("orders", ["127.0.0.1:0"])


def test_a_url_lists_the_endpoints_of_a_cluster() -> None:
    assert parse_url("grpc://H1:5001,h2:5002,[::1]:5003") == ("h1:5001", "h2:5002", "[::1]:5003")
    assert parse_url("grpc+tcp://h1:5001/") == ("h1:5001",)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("h1:5001", 'write "grpc://host:port'),
        ("http://h1:5001", 'write "grpc://host:port'),
        ("tls://h1:5001", "or grpc\\+tls:// if its nodes encrypt"),
        ("grpc://", "endpoint 1 '' has no port"),
        ("grpc://h1:5001,", "endpoint 2 '' has no port"),
        ("grpc://h1:5001,h1:5001", "endpoint 2 is 'h1:5001', which number 1 has"),
        ("grpc://user@h1:5001", "no valid host"),
        (b"grpc://h1:5001", "bytes"),
    ],
)
def test_a_malformed_url_is_refused(url: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_url(url)


def test_a_file_gives_a_node(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(GOOD)
    node = load_config(path)
    assert (node.id, node.endpoint, node.listen_endpoint) == (2, "127.0.0.1:5002", "0.0.0.0:5002")
    assert node.data_dir == tmp_path / "data/two"
    assert (node.cluster.cluster_id, node.cluster.election_timeout_ms, node.cluster.max_entry_size) == (
        "orders",
        1000,
        2**20,
    )


def test_a_node_may_be_named_by_its_endpoint_and_listens_there() -> None:
    text = GOOD.replace("id = 2", 'endpoint = "127.0.0.1:5003"').replace('listen = "0.0.0.0:5002"', "")
    node = parse_config(text, Path("/d"))
    assert (node.id, node.listen_endpoint) == (3, "127.0.0.1:5003")


def test_an_absolute_data_directory_stays() -> None:
    assert parse_config(GOOD.replace("data/two", "/srv/two"), Path("/etc/marble")).data_dir == Path("/srv/two")


def test_endpoints_may_be_a_table_of_ids() -> None:
    text = (
        '[node]\nid = 9\ndata_dir = "d"\n[cluster]\ncluster_id = "c"\n[cluster.node_endpoints]\n4 = "h:4"\n9 = "h:9"\n'
    )
    node = parse_config(text, Path())
    assert (dict(node.cluster.endpoints), node.endpoint) == ({4: "h:4", 9: "h:9"}, "h:9")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "election_timeout_ms",
            "election_timout_ms",
            r"unknown key 'election_timout_ms' in \[cluster\].*'election_timeout_ms'",
        ),
        ("data_dir", "datadir", r"unknown key 'datadir' in \[node\].*'data_dir'"),
        ("[cluster]", "[clusters]", r"unknown key 'clusters'.*\[cluster\]"),
        ("[node]", "endpoints = 1\n[node]", r"unknown key 'endpoints' outside"),
        ("max_entry_size", "endpoints", "unknown key 'endpoints'.*'node_endpoints'"),
        ('cluster_id = "orders"', "", r"\[cluster\] has no 'cluster_id'"),
        ('data_dir = "data/two"', "", r"\[node\] has no 'data_dir'"),
        ("id = 2", "", "one of 'id' and 'endpoint'"),
        ("id = 2", 'id = 2\nendpoint = "127.0.0.1:5002"', "one of 'id' and 'endpoint'"),
        ("id = 2", "id = 4", r"id is 4, but the cluster's nodes are 1, 2, 3"),
        ("id = 2", "id = true", "bool True"),
        ("id = 2", 'endpoint = "127.0.0.1:9"', "no node of the cluster has the endpoint '127.0.0.1:9'"),
        ('"data/two"', "5", "data_dir must name a directory, not int 5"),
        ('"data/two"', '""', "data_dir must name a directory"),
        ("0.0.0.0:5002", "0.0.0.0", "listen .* no port"),
        ("= 1000", '= "1000"', "election_timeout_ms must be a whole number, not str '1000'"),
        ("= 150", "= ", "not valid TOML"),
        ("[node]", "node = 5\n[other]", "unknown key 'other'"),
        ("127.0.0.1:5003", "127.0.0.1:5001", "number 3 is '127.0.0.1:5001'"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "node.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UsageError, match=words) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_node_that_is_not_a_table_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[node\] must be a table"):
        parse_config('node = 5\n[cluster]\ncluster_id = "c"\nnode_endpoints = ["h:1"]\n', Path())
    with pytest.raises(UsageError, match=r"\[cluster\] must be a table"):
        parse_config('cluster = [1]\n[node]\nid = 1\ndata_dir = "d"\n', Path())


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a UTF-8 text file"):
        load_config(binary)


def test_a_node_config_from_python_is_checked_too() -> None:
    cluster = RaftClusterConfig("orders", THREE)
    assert NodeConfig(1, Path("d"), cluster, "127.0.0.1:0").listen_endpoint == "127.0.0.1:0"
    with pytest.raises(UsageError, match="id is 0"):
        NodeConfig(0, Path("d"), cluster)
    with pytest.raises(UsageError, match="data_dir"):
        NodeConfig(1, None, cluster)  # type: ignore[arg-type]


def joining(cluster_line: str = "", **changes: str) -> NodeConfig:
    keys = {"id": "4", "endpoint": '"h:5004"', "data_dir": '"four"', "join": "true"} | changes
    lines = "\n".join(f"{key} = {value}" for key, value in keys.items() if value)
    endpoints = ", ".join(f'"{endpoint}"' for endpoint in THREE)
    cluster = f'cluster_id = "orders"\nnode_endpoints = [{endpoints}]\n{cluster_line}'
    return parse_config(f"[node]\n{lines}\n[cluster]\n{cluster}\n", Path("/etc/marble"))


def test_a_node_that_joins_need_not_be_among_the_nodes_it_is_told_of() -> None:
    config = joining()
    assert (config.id, config.join, config.endpoint, config.listen_endpoint) == (4, True, "h:5004", "h:5004")
    assert joining(listen='"0.0.0.0:0"').listen_endpoint == "0.0.0.0:0"
    # Once it has joined, the list may be brought up to date.
    assert joining(id="2", endpoint="").endpoint == THREE[1]
    assert joining(id="2", endpoint=f'"{THREE[1]}"').endpoint == THREE[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": ""}, "needs an 'id' to join with"),
        ({"endpoint": ""}, "endpoint must say where others find it"),
        ({"endpoint": '"h"'}, "endpoint 'h' has no port"),
        ({"endpoint": f'"{THREE[1]}"'}, "4 is to join at .*5002, but in node_endpoints node 2 is at .*5002"),
        ({"id": "2"}, "2 is to join at h:5004, but in node_endpoints node 2 is at"),
        ({"join": '"yes"', "endpoint": ""}, "join must be true or false, not str 'yes'"),
        ({"join": "false", "endpoint": ""}, "set .node. join to add another"),
        ({"join": "false"}, "needs one of 'id' and 'endpoint'"),
        ({"priority": "-1"}, "priority is -1"),
        ({"priority": "65536"}, "priority is 65536"),
        ({"log_level": '"loud"'}, "log_level must be one of DEBUG"),
        ({"retention": "-1"}, "retention is -1"),
        ({"log_format": "1"}, "log_format must be one of text, json, not 1"),
        ({"priority": "true"}, "priority must be a whole number, not bool"),
    ],
)
def test_a_node_that_cannot_join_like_that_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        joining(**changes)


def test_an_endpoint_beside_an_id_is_for_a_node_that_joins() -> None:
    with pytest.raises(UsageError, match="is for a node with join = true"):
        NodeConfig(4, Path("d"), RaftClusterConfig("orders", THREE), joining_endpoint="h:5004")


def test_switches_are_off_unless_asked_for() -> None:
    config = RaftClusterConfig("orders", THREE)
    assert not config.lease_reads
    assert dataclasses.replace(config, lease_reads=True, snapshot_distance=1).lease_reads
    assert NodeConfig(1, Path("d"), config).priority == 0


SECURE = """
[cluster]
cluster_id = "orders"
node_endpoints = ["127.0.0.1:5001"]
enable_ssl = true

[node]
id = 1
data_dir = "data"
secret_file = "secret"

[node.tls]
certificate = "tls/node.pem"
key = "/keys/node.key"
ca = "tls/ca.pem"
client_ca = "tls/clients.pem"
client_certificates = true
peer_names = ["node-*.example"]
reload_s = 2.5

[node.tokens]
file = "tokens.toml"
"""


def test_the_files_of_security_start_at_the_directory_of_the_config(tmp_path: Path) -> None:
    security = parse_config(SECURE, tmp_path).security
    assert security.tls is not None
    assert security.tokens is not None
    assert (security.tls.certificate, security.tls.key) == (tmp_path / "tls/node.pem", Path("/keys/node.key"))
    assert (security.tls.client_ca, security.tls.reload_s) == (tmp_path / "tls/clients.pem", 2.5)
    assert security.tls.peer_names == ("node-*.example",)
    assert (security.tokens.file, security.tokens.reload_s) == (tmp_path / "tokens.toml", 10.0)
    assert security.secret_file == tmp_path / "secret"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("enable_ssl = true", "", r"\[node.tls\] is given, but not \[cluster\] enable_ssl"),
        ('key = "/keys/node.key"', "", r"\[node.tls\] has no 'key'"),
        ('key = "/keys/node.key"', "key = 3", r"\[node.tls\] key must name a file"),
        ('key = "/keys/node.key"', 'key = ""', r"\[node.tls\] key must name a file"),
        ("client_certificates = true", "", "client_ca is of use only with client_certificates"),
        ('secret_file = "secret"', "", r"client_ca needs \[node\] secret_file"),
        ('secret_file = "secret"', "secret_file = 1", "secret_file must name a file"),
        ("reload_s = 2.5", "reload_s = true", "reload_s must be 0.05 to 86400 seconds"),
        ("reload_s = 2.5", "reload_s = 0", "reload_s must be"),
        ('["node-*.example"]', '"node-1"', "peer_names must be a list"),
        ('["node-*.example"]', '["a b"]', "is not the name of a node"),
        ('file = "tokens.toml"', 'fil = "tokens.toml"', r"unknown key 'fil' in \[node.tokens\]: did you mean 'file'"),
        ('[node.tokens]\nfile = "tokens.toml"', "", ""),
    ],
)
def test_wrong_security_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SECURE
    text = SECURE.replace(old, new)
    if not message:
        assert parse_config(text, tmp_path).security.tokens is None
        return
    with pytest.raises(UsageError, match=message):
        parse_config(text, tmp_path)


def test_encryption_needs_certificates(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs \[node.tls\]"):
        NodeConfig(1, tmp_path, RaftClusterConfig("c", THREE, enable_ssl=True))
