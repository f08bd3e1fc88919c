"""Encryption: who may connect to whom, what those are told who may not, and certificates that change while streams go on."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pyarrow.flight as fl
import pytest
from transport.pki import LOCAL, Files, Node, ask, authority, client, eventually, running

from marble.certs import issue
from marble.config import SecurityConfig, TlsConfig
from marble.errors import UnavailableError, UsageError
from marble.metrics import Metrics
from marble.transport.faults import from_flight_error
from marble.transport.security import PLAIN, Credentials, read_security
from marble.transport.watching import WatchedSecurity


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def serial(endpoint: str) -> bytes:
    """The certificate that a new connection is shown."""
    host, port = endpoint.rsplit(":", 1)
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, int(port)), timeout=30)).hex().encode()


def refusal(endpoint: str, credentials: Credentials) -> str:
    with pytest.raises(fl.FlightUnavailableError) as caught:
        ask(endpoint, credentials)
    told = from_flight_error(caught.value)
    assert type(told) is UnavailableError
    return str(told)


def test_right_certificates_are_taken(files: Files) -> None:
    with running(node := Node(1, SecurityConfig(tls=files.node(client_certificates=True))).start()):
        assert ask(node.endpoint, client(by="first")) == b"you"
        assert ask(f"localhost:{node.transport.port}", client(by="first")) == b"you"


@pytest.mark.parametrize(
    ("node", "credentials", "words"),
    [
        ({"by": "other"}, client(), "signed by nobody who is trusted here: give the CA"),
        ({"begins_days": -10, "days": 1}, client(), "has expired: put a new one"),
        ({"begins_days": 10}, client(), "not valid yet, or the clock of this machine"),
        ({"names": ("example.org",)}, client(), "does not name the host by which it was called"),
        ({}, PLAIN, "it may want encryption"),
        ({"client_certificates": True}, client(), "or a certificate that its CA has signed"),
        ({"client_certificates": True}, client(by="other"), "or a certificate that its CA has signed"),
        (None, client(), "it speaks without encryption, and this side with"),
    ],
    ids=["wrong-ca", "expired", "not-yet", "wrong-name", "downgrade", "no-certificate", "foreign-certificate", "plain-server"],
)  # fmt: skip
def test_wrong_ones_are_refused_in_words(
    files: Files, node: dict[str, object] | None, credentials: Credentials, words: str
) -> None:
    tls = None if node is None else files.node(**node)  # type: ignore[arg-type]
    with running(made := Node(1, SecurityConfig(tls=tls)).start()):
        told = refusal(made.endpoint, credentials)
        assert words in told
        assert told.startswith(made.endpoint)


def test_clients_may_have_a_ca_of_their_own(files: Files) -> None:
    bundle = files.put("clients.pem", authority("clients")[0])
    tls = files.node(client_certificates=True, client_ca=bundle, peer_names=["127.0.0.*"])
    with running(node := Node(1, SecurityConfig(tls, secret_file=files.secret())).start()):
        assert ask(node.endpoint, client(by="clients")) == b"you"
        assert ask(node.endpoint, client(by="first")) == b"you"
        assert "that its CA has signed" in refusal(node.endpoint, client(by="third"))


def two(tmp_path: Path, *securities: SecurityConfig) -> tuple[Node, Node]:
    one, other = Node(1, securities[0]), Node(2, securities[1])
    one.start(other)
    other.start(one)
    return one, other


def in_directory(tmp_path: Path, name: str) -> Files:
    (tmp_path / name).mkdir()
    return Files(tmp_path / name)


def test_nodes_talk_under_mutual_tls(tmp_path: Path) -> None:
    configs = [
        SecurityConfig(tls=in_directory(tmp_path, name).node(client_certificates=True, peer_names=["127.0.0.1"]))
        for name in "ab"
    ]
    one, other = two(tmp_path, *configs)
    with running(one, other):
        one.beat(other)
        other.beat(one)
        assert one.inbox.get(timeout=30)
        assert other.inbox.get(timeout=30)


def test_a_node_of_another_ca_is_no_peer(tmp_path: Path) -> None:
    mine = in_directory(tmp_path, "a").node(client_certificates=True)
    theirs = in_directory(tmp_path, "b").node(by="other", client_certificates=True)
    one, other = two(tmp_path, SecurityConfig(tls=mine), SecurityConfig(tls=theirs))
    with running(one, other):
        eventually(lambda: one.count("transport_streams_broken") > 1, "no stream broke")
        eventually(lambda: other.count("transport_streams_broken") > 1, "no stream broke")
        assert not one.transport.connected(2)
        assert not other.transport.connected(1)


def test_a_client_s_certificate_makes_no_node(tmp_path: Path) -> None:
    good = SecurityConfig(tls=in_directory(tmp_path, "a").node(client_certificates=True, peer_names=["127.0.0.*"]))
    # The same CA signed it, for somebody else.
    files = in_directory(tmp_path, "b")
    certificate, key = files.pair("node", issue(authority(), ("etl", *LOCAL), serves=True))
    bad = SecurityConfig(tls=TlsConfig(certificate, key, files.put("ca.pem", authority()[0]), client_certificates=True))
    one, other = two(tmp_path, good, bad)
    with running(one, other):
        eventually(lambda: one.count("transport_unauthenticated") > 0, "it came in")
        assert other.inbox.empty()
        assert one.inbox.empty()


def test_a_client_s_certificate_cannot_pose_as_a_server(files: Files) -> None:
    certificate, key = files.pair("node", issue(authority(), LOCAL, serves=False))
    tls = TlsConfig(certificate, key, files.put("ca.pem", authority()[0]))
    with running(node := Node(1, SecurityConfig(tls=tls)).start()), pytest.raises(fl.FlightUnavailableError):
        ask(node.endpoint, client())


class Streams(Node):
    """A node whose clients keep streams open."""

    def __init__(self, security: SecurityConfig) -> None:
        super().__init__(1, security, service=self)

    def do_exchange(self, context: object, descriptor: object, reader: object, writer: object) -> None:
        for chunk in reader:  # type: ignore[attr-defined]
            writer.write_metadata(chunk.app_metadata)  # type: ignore[attr-defined]

    def do_action(self, context: object, action: fl.Action) -> object:
        return iter([b"you"])


def test_a_new_certificate_is_taken_up_under_load_and_no_stream_ends(files: Files) -> None:
    node = Streams(SecurityConfig(tls=files.node()))
    with running(node.start()):
        first = serial(node.endpoint)
        with client().client(node.endpoint, [("grpc.use_local_subchannel_pool", 1)]) as old:
            writer, reader = old.do_exchange(fl.FlightDescriptor.for_path("x"))
            stop, rounds, broken = threading.Event(), [0], []

            def echo() -> None:
                try:
                    while not stop.is_set():
                        writer.write_metadata(b"%d" % rounds[0])
                        assert reader.read_chunk().app_metadata.to_pybytes() == b"%d" % rounds[0]
                        rounds[0] += 1
                except BaseException as error:
                    broken.append(error)

            thread = threading.Thread(target=echo)
            thread.start()
            try:
                for number in (1, 2, 3):
                    before = serial(node.endpoint)
                    files.pair("node", issue(authority(), LOCAL, serves=True))
                    eventually(lambda n=number: node.count("security_reloads") >= n, "not read again")  # type: ignore[misc]
                    eventually(lambda b=before: serial(node.endpoint) != b, "the old certificate is still shown")  # type: ignore[misc]
                    # No connection comes to the old server any more.
                    now = serial(node.endpoint)
                    assert {serial(node.endpoint) for _ in range(10)} == {now}
                    assert now != first
                    assert ask(node.endpoint, client()) == b"you"
                    done = rounds[0]
                    eventually(lambda d=done: rounds[0] > d + 10 or bool(broken), "the stream stands still")  # type: ignore[misc]
            finally:
                stop.set()
                thread.join(30)
            assert broken == []
            writer.done_writing()
            writer.close()


def test_the_link_of_a_peer_goes_on_over_a_new_certificate(tmp_path: Path) -> None:
    files = [in_directory(tmp_path, name) for name in "ab"]
    one, other = two(tmp_path, *(SecurityConfig(tls=each.node(client_certificates=True)) for each in files))
    with running(one, other):
        other.beat(one)
        assert one.inbox.get(timeout=30)
        opened = other.count("transport_streams_opened")
        files[0].pair("node", issue(authority(), LOCAL, serves=True))
        eventually(lambda: one.count("security_reloads") == 1, "not read again")
        other.beat(one)
        assert one.inbox.get(timeout=30)
        assert other.count("transport_streams_opened") == opened


def test_files_that_do_not_fit_change_nothing(files: Files) -> None:
    with running(node := Node(1, SecurityConfig(tls=files.node())).start()):
        before = serial(node.endpoint)
        certificate, key = issue(authority(), LOCAL, serves=True)
        files.put("node.pem", certificate)
        eventually(lambda: node.count("security_reload_failures") == 1, "not seen")
        assert serial(node.endpoint) == before
        # The other half comes later.
        files.put("node.key", key)
        eventually(lambda: node.count("security_reloads") == 1, "not read again")
        assert serial(node.endpoint) != before


def test_a_node_stops_in_time_while_an_old_server_still_has_streams(files: Files) -> None:
    node = Streams(SecurityConfig(tls=files.node())).start()
    with client().client(node.endpoint) as old:
        writer, reader = old.do_exchange(fl.FlightDescriptor.for_path("x"))
        writer.write_metadata(b"1")
        assert reader.read_chunk().app_metadata == b"1"
        files.pair("node", issue(authority(), LOCAL, serves=True))
        eventually(lambda: node.count("security_reloads") == 1, "not read again")
        assert node.transport.stop(2.0)
        with pytest.raises((fl.FlightError, OSError)):
            reader.read_chunk()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", node.transport.port))
        probe.listen()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("node.pem", b"", "no certificate and its key"),
        ("node.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no certificate and its key"),
        ("node.key", b"\xff\xfe", "no certificate and its key"),
        ("ca.pem", b"nothing", "ca.pem: no CA's certificate"),
        ("node.key", b"x" * (2 << 20), "node.key: the key has more than"),
    ],
)
def test_wrong_files_are_named_and_not_shown(files: Files, name: str, data: bytes, words: str) -> None:
    config = SecurityConfig(tls=files.node())
    key = (files.directory / "node.key").read_text()
    files.put(name, data)
    with pytest.raises(UsageError, match=words) as caught:
        read_security(config)
    assert key.splitlines()[1] not in str(caught.value)
    (files.directory / name).unlink()
    with pytest.raises(UsageError, match=f"{name}: .* cannot be read: No such file"):
        WatchedSecurity(config, 1, Metrics())


def test_nothing_shows_a_key(files: Files) -> None:
    security = read_security(SecurityConfig(tls=files.node(), secret_file=files.secret()))
    shown = repr(security) + repr(security.peer_credentials("c", 1))
    assert "PRIVATE" not in shown
    assert "BEGIN" not in shown
    assert base64_of_secret(files) not in shown


def base64_of_secret(files: Files) -> str:
    return (files.directory / "secret").read_text()
