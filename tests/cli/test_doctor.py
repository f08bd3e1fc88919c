"""``marble doctor`` against ports that misbehave in every way, nodes that are well, and clusters that are not."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest
import trustme
from server.cluster import Cluster, eventually, free_endpoints

from marble.cli import main
from marble.doctor import Finding, Level, Papers, Report, examine
from marble.doctor.findings import Notes
from marble.doctor.reach import find_addresses
from marble.errors import UsageError

PATIENT_S = 30.0
"""For a check that is to succeed, however busy the machine is."""

HASTY_S = 0.2
"""For a check that is to run into its deadline."""

SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


class Port:
    """A port where each connection is handed to `talk`, on threads that end with the port."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.number = self._listener.getsockname()[1]
        self.endpoint = f"127.0.0.1:{self.number}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="test-port", daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), name="test-talk", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            self._talk(connection)

    def close(self) -> None:
        # Closing alone would not wake who accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENT_S)
            assert not thread.is_alive()


@pytest.fixture
def port() -> Iterator[Callable[[Callable[[socket.socket], None]], Port]]:
    ports: list[Port] = []

    def make(talk: Callable[[socket.socket], None]) -> Port:
        ports.append(Port(talk))
        return ports[-1]

    yield make
    for each in ports:
        each.close()


def drain(connection: socket.socket) -> None:
    """Read until the other side ends it."""
    while connection.recv(4096):
        continue


def problems(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.level is Level.PROBLEM]


def only_problem(report: Report) -> Finding:
    (found,) = problems(report)
    assert found.advice
    assert not report.healthy
    return found


# -- names and connections -----------------------------------------------------------------------------------------------


def test_a_name_that_nobody_knows() -> None:
    found = only_problem(examine(["marble-doctor.invalid:5001"], timeout_s=PATIENT_S))
    assert found.check == "name"
    assert "'marble-doctor.invalid'" in found.words


def test_a_name_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(PATIENT_S))
    notes = Notes("h:1")
    assert find_addresses(notes, "h", 1, HASTY_S) == []
    over.set()
    assert "was not resolved within 0.2 s" in notes.findings[0].words


def test_a_port_where_nothing_listens() -> None:
    found = only_problem(examine(free_endpoints(1), timeout_s=PATIENT_S))
    assert (found.check, "refused" in found.words) == ("connect", True)
    assert "marble serve" in found.advice


def test_a_machine_that_answers_nothing() -> None:
    with socket.socket() as listener:
        # A full queue of connections: further ones are ignored, as by a firewall that drops them.
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        place = listener.getsockname()
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(place)
            found = only_problem(examine([f"127.0.0.1:{place[1]}"], timeout_s=HASTY_S))
    assert found.check == "connect"
    assert "firewall" in found.words


# -- what is spoken ------------------------------------------------------------------------------------------------------


def test_a_port_that_accepts_and_is_silent(port: Callable[..., Port]) -> None:
    found = only_problem(examine([port(drain).endpoint], timeout_s=HASTY_S))
    assert (found.check, "says nothing" in found.words) == ("speech", True)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "another program listens on this port: it answers b'SSH-2.0"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a web server (HTTP/1)"),
        (b"", "closes the connection without a word"),
        (b"\x00", "another program"),
        (b"\xff" * 4096, "another program"),
    ],
)
def test_a_port_of_another_program(port: Callable[..., Port], answer: bytes, words: str) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(answer)

    found = only_problem(examine([port(talk).endpoint], timeout_s=PATIENT_S))
    assert found.check == "speech"
    assert words in found.words


def test_a_port_that_speaks_http2_and_never_answers_a_call(port: Callable[..., Port]) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(SETTINGS)
        drain(connection)

    found = only_problem(examine([port(talk).endpoint], timeout_s=2.0))
    assert found.check == "call"


def test_a_flight_server_that_is_no_node() -> None:
    with flight.FlightServerBase("grpc://127.0.0.1:0") as server:
        found = only_problem(examine([f"127.0.0.1:{server.port}"], timeout_s=PATIENT_S))
    assert found.check == "call"
    assert "not a marble node" in found.words


class Talkative(flight.FlightServerBase):  # type: ignore[misc]
    def __init__(self, answer: bytes) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._answer = answer

    def do_action(self, context: Any, action: Any) -> Iterator[bytes]:
        yield self._answer


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"cluster_id": 1, "node_id": 1}', b"\xff", b"{" * 10_000])
def test_a_flight_server_that_answers_nonsense(answer: bytes) -> None:
    with Talkative(answer) as server:
        found = only_problem(examine([f"127.0.0.1:{server.port}"], timeout_s=PATIENT_S))
    assert found.check == "call"


def test_a_node_that_names_nonsense_as_its_peers() -> None:
    answer = {
        "cluster_id": "c",
        "node_id": 1,
        "leader_id": 1,
        "nodes": {"2": "not an endpoint", "x": 5, "3": None},
        "members": "all",
        "peers": 7,
        "wall_us": "now",
        "disk": [],
        "links": {"a": 1},
    }
    with Talkative(json.dumps(answer).encode()) as server:
        report = examine([f"127.0.0.1:{server.port}"], timeout_s=PATIENT_S)
    assert report.findings


# -- TLS -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def write_ca(folder: Path, authority: trustme.CA, name: str = "ca.pem") -> Path:
    path = folder / name
    authority.cert_pem.write_to_path(str(path))
    return path


def tls_talk(certificate: trustme.LeafCert, wants: trustme.CA | None = None) -> Callable[[socket.socket], None]:
    """A server with `certificate` that opens HTTP/2, and may want one of its clients."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    context.set_alpn_protocols(["h2"])
    if wants is not None:
        wants.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED

    def talk(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.sendall(SETTINGS)
            drain(encrypted)

    return talk


def days(count: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=count)


def test_a_certificate_of_another_ca(tmp_path: Path, port: Callable[..., Port], authority: trustme.CA) -> None:
    endpoint = port(tls_talk(authority.issue_cert("127.0.0.1"))).endpoint
    other = write_ca(tmp_path, trustme.CA())
    for papers in (Papers(), Papers(ca=other)):
        found = only_problem(examine([endpoint], papers, timeout_s=PATIENT_S))
        assert found.check == "tls-ca"
        assert "--ca" in found.advice
    assert str(other) in found.words


def test_a_certificate_of_another_name(tmp_path: Path, port: Callable[..., Port], authority: trustme.CA) -> None:
    papers = Papers(ca=write_ca(tmp_path, authority))
    endpoint = port(tls_talk(authority.issue_cert("node-7.example", "10.9.8.7"))).endpoint
    found = only_problem(examine([endpoint], papers, timeout_s=PATIENT_S))
    assert (found.check, found.words) == (
        "tls-name",
        "the certificate is not for '127.0.0.1': it is for node-7.example, 10.9.8.7",
    )


@pytest.mark.parametrize(
    ("begin", "end", "words"), [(-9, -2, "the certificate has expired ("), (2, 9, "the certificate is not valid yet (")]
)
def test_a_certificate_of_another_time(
    tmp_path: Path, port: Callable[..., Port], authority: trustme.CA, begin: float, end: float, words: str
) -> None:
    papers = Papers(ca=write_ca(tmp_path, authority))
    certificate = authority.issue_cert("127.0.0.1", not_before=days(begin), not_after=days(end))
    found = only_problem(examine([port(tls_talk(certificate)).endpoint], papers, timeout_s=PATIENT_S))
    assert found.check == "tls-time"
    assert found.words.startswith(words)
    assert "GMT" in found.words


def test_a_node_that_wants_a_certificate_of_its_clients(
    tmp_path: Path, port: Callable[..., Port], authority: trustme.CA
) -> None:
    ca = write_ca(tmp_path, authority)
    endpoint = port(tls_talk(authority.issue_cert("127.0.0.1"), wants=authority)).endpoint
    found = only_problem(examine([endpoint], Papers(ca=ca), timeout_s=PATIENT_S))
    assert (found.check, "mutual TLS" in found.words) == ("tls-client", True)

    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    stranger = trustme.CA().issue_cert("me.example")
    stranger.cert_chain_pems[0].write_to_path(str(files[0]))
    stranger.private_key_pem.write_to_path(str(files[1]))
    found = only_problem(examine([endpoint], Papers(ca, *files), timeout_s=PATIENT_S))
    assert (found.check, "another CA" in found.words) == ("tls-client", True)


def test_with_and_without_tls_are_told_apart(
    tmp_path: Path, port: Callable[..., Port], authority: trustme.CA, shared: Cluster
) -> None:
    plain, encrypted = shared.config.endpoints[1], port(tls_talk(authority.issue_cert("127.0.0.1"))).endpoint
    for papers, tls in ((Papers(), True), (Papers(ca=write_ca(tmp_path, authority)), None)):
        found = only_problem(examine([plain], papers, tls=tls, others=False, timeout_s=PATIENT_S))
        assert (found.check, "without TLS" in found.words) == ("tls", True)
    found = only_problem(examine([encrypted], tls=False, timeout_s=PATIENT_S))
    assert (found.check, "speaks TLS" in found.words) == ("tls", True)


def test_a_flight_port_with_tls_and_a_certificate_that_ends_soon(tmp_path: Path, authority: trustme.CA) -> None:
    certificate = authority.issue_cert("localhost", not_after=days(3))
    pair = (certificate.cert_chain_pems[0].bytes(), certificate.private_key_pem.bytes())
    papers = Papers(ca=write_ca(tmp_path, authority))
    answer = json.dumps({"cluster_id": "c", "node_id": 1, "role": "leader", "term": 2, "leader_id": 1}).encode()

    class Encrypted(Talkative):
        def __init__(self) -> None:
            flight.FlightServerBase.__init__(self, "grpc+tls://127.0.0.1:0", tls_certificates=[pair])
            self._answer = answer

    with Encrypted() as server:
        report = examine([f"localhost:{server.port}"], papers, timeout_s=PATIENT_S)
        # The certificate names a host: its address needs to be told which.
        found = only_problem(examine([f"127.0.0.1:{server.port}"], papers, timeout_s=PATIENT_S))
        named = Papers(ca=papers.ca, server_name="localhost")
        assert examine([f"127.0.0.1:{server.port}"], named, timeout_s=PATIENT_S).healthy
    assert found.check == "tls-name"
    assert report.healthy
    assert [each.check for each in report.findings if each.level is Level.WARNING] == ["tls-time"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda folder: Papers(ca=folder / "none.pem"),
        lambda folder: Papers(certificate=folder / "file"),
        lambda folder: Papers(ca=folder / "file").context(),
        lambda folder: Papers(token_file=folder / "file").token(),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, wrong: Callable[[Path], object]) -> None:
    (tmp_path / "file").write_text("\n")
    with pytest.raises(UsageError):
        wrong(tmp_path)


# -- clusters ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("doctor"))
    yield cluster
    cluster.stop()


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["doctor", "--timeout", str(PATIENT_S), *arguments])
    return status, capsys.readouterr().out


def test_a_cluster_that_is_well(capsys: pytest.CaptureFixture[str], shared: Cluster) -> None:
    leader = shared.leader()
    servers = list(shared.servers.values())
    eventually(lambda: all(all(server.get_health_status().values()) for server in servers), "health")
    status, out = doctor(capsys, shared.config.endpoints[shared.follower()], "--cluster-id", "test")
    assert (status, "PROBLEM" in out) == (0, False)
    # One was named; the others were found through it.
    assert [
        out.count(f"\n{endpoint}\n") + out.startswith(endpoint) for endpoint in shared.config.endpoints.values()
    ] == [
        1,
        1,
        1,
    ]
    assert f"node {leader} leads in term" in out
    assert out.endswith("nothing is wrong\n")


def test_only_the_named_node_and_another_cluster(capsys: pytest.CaptureFixture[str], shared: Cluster) -> None:
    status, out = doctor(capsys, f"grpc://{shared.config.endpoints[1]}", "--only", "--json", "--cluster-id", "prod")
    told = json.loads(out)
    assert (status, told["healthy"]) == (1, False)
    assert {each["where"] for each in told["findings"]} <= {shared.config.endpoints[1], "cluster"}
    (problem,) = (each for each in told["findings"] if each["level"] == "problem")
    assert problem["check"] == "cluster"
    assert "belongs to cluster 'test', not to 'prod'" in problem["words"]


def test_a_cluster_without_its_majority(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        keeps = cluster.follower()
        for node in set(cluster.servers) - {keeps}:
            cluster.stop_node(node)
        eventually(lambda: cluster.servers[keeps].get_leader_endpoint() is None, "no leader")
        status, out = doctor(capsys, cluster.config.endpoints[keeps])
    finally:
        cluster.stop()
    assert status == 1
    assert out.count("connection is refused") == 2
    assert "there is no leader, and cannot be: of 3 voters 1 answer, and 2 are" in " ".join(out.split())


def test_what_clients_take_from_the_environment_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, port: Callable[..., Port]
) -> None:
    own = trustme.CA()
    endpoint = port(tls_talk(trustme.CA().issue_cert("127.0.0.1"))).endpoint
    monkeypatch.setenv("MARBLE_CA", str(write_ca(tmp_path, own)))
    status, out = doctor(capsys, endpoint, "--json")
    assert status == 1
    assert str(tmp_path / "ca.pem") in out


@pytest.mark.parametrize("arguments", [["h"], ["http://h:1"], ["h:1", "--timeout", "0"], [""], ["h:1", "--cert", "x"]])
def test_a_wrong_call_is_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert "MARBLE_CERT" not in os.environ, "what one command brought is not what the process brings from then on"
    assert capsys.readouterr().err.startswith("marble: ")
