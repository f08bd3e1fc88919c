"""The command line: exit statuses, one clear message, and what each command prints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import marble
from marble.cli import _Signals, main
from marble.config import parse_config
from marble.demo.processes import NodeProcess, Nodes, find_free_ports, serve_command
from marble.server import server_from_config

SCHEMA = pa.schema([("id", pa.int64()), ("v", pa.string())])


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    output = capsys.readouterr()
    return status, output.out, output.err


def test_version_is_an_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "version")
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == out


def test_version_names_what_matters_in_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "version")
    assert status == 0
    assert re.fullmatch(
        rf"marble {re.escape(marble.__version__)}, pyarrow {re.escape(pa.__version__)}, Python 3\.\S+\n", out
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--rows", "0"], "--rows 0"),
        (["demo", "--file", "x.csv"], "--file and --key belong together"),
        (["demo", "--key", "id"], "--file and --key belong together"),
        (["demo", "--file", "/nowhere/x.csv", "--key", "id"], "/nowhere/x.csv: no such file"),
        (["serve", "--config", "/nowhere/node.toml"], "/nowhere/node.toml: cannot be read"),
        (["serve", "--config", "/nowhere/node.toml", "--log-level", "loud"], "--log-level must be one of DEBUG, INFO"),
        (["status", "127.0.0.1:5001"], "is not the address of a cluster"),
        (["log", "/nowhere"], "not a node's data directory"),
        (["members", "127.0.0.1:5001"], "is not the address of a cluster"),
        (["members", "grpc://h:1", "--remove", "1", "--leave"], "--leave ends a transition"),
        (["transfer", "h:1", "--to", "1"], "is not the address of a cluster"),
        (["snapshot", "h:1"], "is not the address of a cluster"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("marble: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["destroy"],
        ["demo", "--row", "x"],
        ["serve"],
        ["log"],
        ["members", "grpc://h:1", "--add", "h:2"],
        ["members", "grpc://h:1", "--add", "x=h:2"],
        ["transfer", "grpc://h:1"],
    ],
)
def test_a_call_that_cannot_be_read_is_status_2_with_the_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: marble" in capsys.readouterr().err


def test_an_unknown_key_in_a_config_is_named_with_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "node.toml"
    path.write_text('[node]\nid = 1\ndata_dir = "d"\n[cluster]\ncluster_id = "c"\nnode_endpoint = ["h:1"]\n')
    status, _, err = run(capsys, "serve", "--config", str(path))
    assert status == 2
    assert err == f"marble: {path}: unknown key 'node_endpoint' in [cluster]: did you mean 'node_endpoints'?\n"


def test_the_log_of_a_database_is_printed_as_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with marble.open(tmp_path / "data") as database:
        index = database.create_table("t", SCHEMA, key=["id"]).write(pa.record_batch([[7], ["x"]], schema=SCHEMA))
    status, out, err = run(capsys, "log", str(tmp_path / "data"))
    assert (status, err) == (0, "")
    header, *lines = out.splitlines()
    assert header.split()[:6] == ["segment", "offset", "group", "index", "term", "kind"]
    rows = [dict(zip(header.split(), line.split(), strict=True)) for line in lines]
    # Group 1 has the tables that are this node's own.
    entries = [row["kind"] for row in rows if row["kind"] != "HARD_STATE" and row["group"] == "0"]
    assert entries == ["NOOP", "CREATE_TABLE", "WRITE"]
    assert {row["checksum_ok"] for row in rows} == {"True"}
    assert [row["index"] for row in rows if row["kind"] == "WRITE"] == [str(index)]


def test_a_damaged_log_is_status_1_with_file_and_offset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with marble.open(tmp_path / "data") as database:
        database.create_table("t", SCHEMA, key=["id"])
    (segment,) = (tmp_path / "data" / "log").glob("*.arrows")
    damaged = bytearray(segment.read_bytes())
    damaged[1000] ^= 1
    segment.write_bytes(damaged)
    status, _, err = run(capsys, "log", str(tmp_path / "data"))
    assert status == 1
    assert re.search(rf"{re.escape(segment.name)}, offset \d+\)\n$", err)


def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path: Path) -> None:
    with marble.open(tmp_path / "data") as database:
        table = database.create_table("t", SCHEMA, key=["id"])
        for number in range(200):
            table.write_async(pa.record_batch([[number], ["x"]], schema=SCHEMA))
    log = f"{sys.executable} -P -m marble.cli log {tmp_path / 'data'} 2>{tmp_path / 'err'}"
    command = f"{log} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[1] == "0"
    assert (tmp_path / "err").read_text() == ""


TLS_FILES = {"certificate": "127.0.0.1.pem", "key": "127.0.0.1.key", "ca": "ca.pem"}


def write_config(tmp_path: Path, node: int, endpoints: list[str]) -> Path:
    path = tmp_path / f"node-{node}.toml"
    listed = ", ".join(f'"{endpoint}"' for endpoint in endpoints)
    path.write_text(
        f'[node]\nid = {node}\ndata_dir = "node-{node}"\n[cluster]\ncluster_id = "test"\nnode_endpoints = [{listed}]\n'
        "election_timeout_ms = 300\nheartbeat_interval_ms = 60\n"
    )
    return path


def test_a_node_says_where_its_page_is(tmp_path: Path) -> None:
    endpoint, page = (f"127.0.0.1:{port}" for port in find_free_ports(2))
    config = write_config(tmp_path, 1, [endpoint])
    config.write_text(config.read_text().replace("[cluster]", f'[node.http]\nendpoint = "{page}"\n[cluster]'))
    with subprocess.Popen(
        serve_command(config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("marble: node 1 listens on ")
            assert process.stdout.readline() == f"marble: its page is http://{page}/\n"
            with urllib.request.urlopen(f"http://{page}/healthz", timeout=30) as answer:
                assert json.load(answer)["live"] is True
        finally:
            process.terminate()
        assert process.wait(30) == 0


HOUSEKEEPING = """
import os, signal, sys
import marble.memory
from marble.cli import main

class Housekeeper:
    def __init__(self, monotonic, spent):
        assert 0 <= spent() <= monotonic()

    def look(self):
        print("looks after it", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

marble.memory.keep_freed_memory = lambda: print("keeps memory", flush=True)
marble.memory.Housekeeper = Housekeeper
sys.exit(main(["serve", "--config", sys.argv[1]]))
"""
"""A node that ends when it has looked after its memory."""


def test_a_node_keeps_freed_memory_and_looks_after_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, 1, [f"127.0.0.1:{find_free_ports(1)[0]}"])
    command = [sys.executable, "-P", "-c", HOUSEKEEPING, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    first, listens, *others = done.stdout.splitlines()
    assert (first, others) == ("keeps memory", ["looks after it"])
    assert listens.startswith("marble: node 1 listens on ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_serves_says_so_answers_and_ends_in_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, number: signal.Signals
) -> None:
    endpoint = f"127.0.0.1:{find_free_ports(1)[0]}"
    command = [*serve_command(write_config(tmp_path, 1, [endpoint])), "--log-json"]
    process = NodeProcess("node 1", command, tmp_path / "err")
    with Nodes({1: process}) as nodes:
        nodes.start()
        assert process.ready_line == f"marble: node 1 listens on {endpoint}, data in {tmp_path / 'node-1'}"
        with marble.connect(f"grpc://{endpoint}") as database:
            database.create_table("t", SCHEMA, key=["id"]).write(pa.record_batch([[7], ["x"]], schema=SCHEMA))
        status, out, _ = run(capsys, "status", f"grpc://{endpoint},127.0.0.1:1")
        assert status == 0
        _, _, header, first, second = out.splitlines()
        shown = dict(zip(re.split(r"\s{2,}", header), re.split(r"\s{2,}", first), strict=True))
        assert (shown["endpoint"], shown["node"], shown["role"], shown["health"]) == (endpoint, "1", "leader", "well")
        assert "  127.0.0.1:1  " in second
        assert process.pid is not None
        os.kill(process.pid, number)
        assert process.wait_stopped() == 0
    lines = [json.loads(line) for line in (tmp_path / "err").read_text().splitlines()]
    assert "node 1 of cluster test starts" in [line["message"] for line in lines]
    assert lines[-1]["message"] == "node 1 has stopped"
    assert {line["node"] for line in lines} == {1}
    assert all("error" not in line for line in lines)


def test_strangers_write_nothing_into_the_log_of_a_node(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    certs = tmp_path / "certs"
    assert run(capsys, "certs", str(certs), "--node", "127.0.0.1")[0] == 0
    port = find_free_ports(1)[0]
    config = write_config(tmp_path, 1, [f"127.0.0.1:{port}"])
    paths = "".join(f'{key} = "{certs / name}"\n' for key, name in TLS_FILES.items())
    text = config.read_text().replace("[cluster]", f"[node.tls]\n{paths}[cluster]\nenable_ssl = true")
    config.write_text(text)
    process = NodeProcess("node 1", [*serve_command(config), "--log-json"], tmp_path / "err")
    believing = ssl.create_default_context(cafile=str(certs / "ca.pem"))
    believing.check_hostname = False
    with Nodes({1: process}) as nodes:
        nodes.start()
        for context in (believing, ssl.create_default_context()):
            with socket.create_connection(("127.0.0.1", port), 30) as plain, contextlib.suppress(ssl.SSLError, OSError):
                context.wrap_socket(plain, server_hostname="example.org").close()
        with socket.create_connection(("127.0.0.1", port), 30) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(OSError):
                plain.recv(1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait_stopped() == 0
    for line in (tmp_path / "err").read_text().splitlines():
        assert json.loads(line)["component"].startswith("marble.")


def test_a_node_whose_port_is_taken_is_status_1_with_the_reason(tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{find_free_ports(1)[0]}"
    first, second = (tmp_path / name for name in ("one", "two"))
    for folder in (first, second):
        folder.mkdir()
    process = NodeProcess("node 1", serve_command(write_config(first, 1, [endpoint])), tmp_path / "err")
    with Nodes({1: process}) as nodes:
        nodes.start()
        command = [
            sys.executable,
            "-P",
            "-m",
            "marble.cli",
            "serve",
            "--config",
            str(write_config(second, 1, [endpoint])),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.search(rf"^marble: .*{endpoint}", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_status_of_a_cluster_that_does_not_answer_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "status", f"grpc://127.0.0.1:{find_free_ports(1)[0]}")
    assert status == 1
    assert out.startswith("no node answers: `marble doctor` says why\n")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A cluster of node 1, and node 2 that waits to be added; their endpoints."""
    endpoints = [f"127.0.0.1:{port}" for port in find_free_ports(2)]
    text = f'[cluster]\ncluster_id = "c"\nnode_endpoints = ["{endpoints[0]}"]\nelection_timeout_ms = 600\n'
    text += "heartbeat_interval_ms = 100\n"
    first = parse_config(f'[node]\nid = 1\ndata_dir = "1"\n{text}', tmp_path)
    node = f'[node]\nid = 2\ndata_dir = "2"\njoin = true\npriority = 1\nendpoint = "{endpoints[1]}"\n'
    second = parse_config(f"{node}{text}", tmp_path)
    with server_from_config(first) as one, server_from_config(second) as two:
        one.start()
        two.start()
        yield endpoints[0], endpoints[1]


def test_members_are_shown_added_promoted_demoted_and_removed(
    capsys: pytest.CaptureFixture[str], started: tuple[str, str]
) -> None:
    url = f"grpc://{started[0]}"
    one, two = f"1     voter    {started[0]}", f"2     learner  {started[1]}"
    status, out, err = run(capsys, "members", url, "--learner", f"2={started[1]}")
    assert (status, err) == (0, "")
    assert out.splitlines() == ["node  part     endpoint", one, two]
    assert run(capsys, "members", url, "--local")[1] == out
    status, promoted, err = run(capsys, "members", url, "--promote", "2")
    assert (status, err) == (0, "")
    assert "2     voter" in promoted
    assert run(capsys, "members", url, "--demote", "2")[1] == out
    status, out, _ = run(capsys, "members", url, "--remove", "2")
    assert [line.split()[0] for line in out.splitlines()] == ["node", "1"]
    status, out, err = run(capsys, "members", url, "--remove", "1")
    assert (status, out) == (2, "")
    assert "voter" in err


def test_an_explicit_transition_is_shown_and_left(capsys: pytest.CaptureFixture[str], started: tuple[str, str]) -> None:
    url = f"grpc://{started[0]}"
    status, out, err = run(capsys, "members", url, "--add", f"2={started[1]}", "--transition", "explicit")
    assert (status, err) == (0, "")
    assert "joining" in out
    assert out.endswith("two majorities decide until: marble members URL --leave\n")
    status, out, err = run(capsys, "members", url, "--leave")
    assert (status, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["1", "voter"], ["2", "voter"]]


def test_leadership_is_handed_over_and_snapshots_are_taken(
    capsys: pytest.CaptureFixture[str], started: tuple[str, str]
) -> None:
    url = f"grpc://{started[0]},{started[1]}"
    assert run(capsys, "members", url, "--add", f"2={started[1]}")[0] == 0
    assert run(capsys, "transfer", url, "--to", "2") == (0, "node 2 leads\n", "")
    assert run(capsys, "transfer", url, "--to", "2") == (0, "node 2 leads\n", "")
    status, _, err = run(capsys, "transfer", url, "--to", "7")
    assert status == 2
    assert "7" in err
    status, out, err = run(capsys, "snapshot", url)
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"endpoint +snapshot\n{started[0]}  \d+\n{started[1]}  \d+\n", out)


def test_a_signal_wakes_who_waits_for_it() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    signals = _Signals([signal.SIGUSR1])
    try:
        assert not signals.wait(0)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.wait(60)
    finally:
        signals.close()
    assert signal.getsignal(signal.SIGUSR1) is before
