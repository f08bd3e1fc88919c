"""The HTTP port: health, metrics and the page's data, and what a stranger cannot do to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server.cluster import WAIT_S, eventually, free_endpoints

import marble
from marble.config import HttpConfig, RaftClusterConfig, SecurityConfig, TokensConfig, parse_config
from marble.errors import UnavailableError, UsageError
from marble.metrics import EDGES, Metrics
from marble.server import create_raft_server
from marble.transport.security import Security
from marble.transport.tokens import parse_tokens
from marble.web.authority import token_authority
from marble.web.http import HttpLimits, HttpServer
from marble.web.observer import Observer

QUICK = HttpLimits(connections_max=3, request_bytes_max=1024, request_s_max=0.4)


class StillNode:
    """A node of which nothing is heard but what was given to it."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.is_running = True
        self.failure: BaseException | None = None
        self.status: dict[str, Any] = {}

    def look(self) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        future.set_result(self.status)
        return future

    def working(self) -> dict[str, float]:
        return {"log": 0.0}


class Port:
    """An HTTP port, and the node behind it."""

    def __init__(self, directory: Path, endpoint: str = "127.0.0.1:0", **options: Any) -> None:
        self.node = StillNode()
        self.observer = Observer(self.node, 1, directory)
        self.server = HttpServer(self.observer, HttpConfig(endpoint), **options)
        self.server.start()
        host, _, port = self.server.endpoint.rpartition(":")
        self.address = (host.strip("[]"), int(port))

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def raw(self, data: bytes) -> bytes:
        """What comes back for `data`, until the port closes."""
        with socket.create_connection(self.address, WAIT_S) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(65536):
                    answer += piece
            return answer


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    made = Port(tmp_path)
    yield made
    made.server.stop()


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Port]:
    made = Port(tmp_path, limits=QUICK)
    yield made
    made.server.stop()


def test_health_by_code_and_in_words(port: Port) -> None:
    status, headers, body = port.ask("/healthz")
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert json.loads(body)["components"]["engine"] == {"healthy": True, "detail": "turns"}
    assert port.ask("/readyz")[0] == 503, "nothing is known of this node yet"
    port.node.failure = OSError("the disk is gone")
    status, _, body = port.ask("/healthz")
    assert status == 503
    assert json.loads(body)["live"] is False


def test_what_there_is_not(port: Port) -> None:
    assert port.ask("/nothing")[0] == 404
    assert port.ask("/../metrics")[0] == 404
    assert port.ask("/page.css/")[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert port.ask("/healthz", method)[0] == 405
    assert port.ask("/api/status?after=nonsense")[0] == 400
    assert port.ask("/api/status?after=nan")[0] == 200


def test_the_page_comes_from_here_and_may_get_nothing_from_elsewhere(port: Port) -> None:
    for path, kind in {
        "/": "text/html",
        "/page.js": "text/javascript",
        "/view.js": "text/javascript",
        "/page.css": "text/css",
    }.items():
        status, headers, body = port.ask(path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["X-Content-Type-Options"] == "nosniff"
        # Links go to this port, names of XML are none.
        outside = body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"http:" not in outside
        assert b"https:" not in outside
        assert b"style=" not in outside
    status, headers, body = port.ask("/", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


def test_a_page_of_a_stranger_learns_nothing(port: Port) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert port.ask("/api/status", Host=host)[0] == 421
    for host in ("localhost", "localhost:9001", "127.0.0.1:9001", "[::1]:9001", "a.localhost"):
        assert port.ask("/api/status", Host=host)[0] == 200


def test_who_has_no_token_gets_health_and_no_more(tmp_path: Path) -> None:
    port = Port(tmp_path, authorize=lambda header: header == "Bearer right")
    try:
        assert port.ask("/healthz")[0] == 200
        assert port.ask("/")[0] == 200
        for path in ("/metrics", "/api/status"):
            status, headers, _ = port.ask(path)
            assert (status, headers["WWW-Authenticate"]) == (401, 'Bearer realm="marble"')
            assert port.ask(path, Authorization="Bearer wrong")[0] == 401
            assert port.ask(path, Authorization="Bearer right")[0] == 200
    finally:
        port.server.stop()


def test_the_tokens_are_those_of_the_flight_port() -> None:
    metrics = Metrics()
    now: list[Security] = [Security()]
    may = token_authority(lambda: now[0], metrics)
    assert may(None), "without tokens everybody may look"
    now[0] = Security(tokens=parse_tokens('[tokens.scraper]\ntoken = "0123456789abcdef0123"\naccess = "read"\n'))
    refused = metrics.counter("transport_unauthenticated")
    assert may("Bearer 0123456789abcdef0123")
    assert not may(None)
    assert refused.value == 0, "who brings nothing is asked, not counted"
    for wrong in (
        "Bearer 0123456789abcdef0124",
        "0123456789abcdef0123",
        "Basic 0123456789abcdef0123",
        "Bearer ",
        "Bearer \udc80",
    ):
        assert not may(wrong)
    assert refused.value == 5
    now[0] = Security(tokens=parse_tokens(""))
    assert not may("Bearer 0123456789abcdef0123"), "a token that was taken back is of no use"


def test_who_sends_too_much_or_nonsense_is_refused(quick: Port) -> None:
    assert b" 431 " in quick.raw(b"GET /" + b"x" * 1019)
    assert b" 431 " in quick.raw(b"GET / HTTP/1.1\r\nA: " + b"x" * 1005)
    assert b" 400 " in quick.raw(b"nonsense\r\n\r\n")
    assert b" 400 " in quick.raw(b"GET /\r\n\r\n")
    assert quick.ask("/healthz")[0] == 200


def test_who_is_slow_is_cut_off(quick: Port) -> None:
    ended = threading.Event()

    def drip() -> None:
        with socket.create_connection(quick.address, WAIT_S) as connection:
            with contextlib.suppress(OSError):
                while True:
                    connection.sendall(b"G")
                    connection.settimeout(0.05)
                    try:
                        if not connection.recv(100):
                            break
                    except TimeoutError:
                        continue
            ended.set()

    thread = threading.Thread(target=drip)
    thread.start()
    assert ended.wait(WAIT_S)
    thread.join()
    # One that says nothing at all is, too.
    assert quick.raw(b"") == b""


def test_one_connection_too_many_is_told_so(tmp_path: Path) -> None:
    port = Port(tmp_path, limits=HttpLimits(connections_max=3, request_s_max=WAIT_S))
    with contextlib.ExitStack() as stack:
        stack.callback(port.server.stop)
        for _ in range(3):
            stack.enter_context(socket.create_connection(port.address, WAIT_S))
        refused = port.node.metrics.counter("http_refused")
        eventually(lambda: port.raw(b"").startswith(b"HTTP/1.1 503") or None, "a refusal")
        assert refused.value >= 1


def test_a_stop_waits_for_nobody(tmp_path: Path) -> None:
    port = Port(tmp_path, limits=HttpLimits(request_s_max=10 * WAIT_S))
    with socket.create_connection(port.address, WAIT_S) as connection:
        connection.sendall(b"GET / HT")
        eventually(lambda: any(thread.name == "marble-http-1-call" for thread in threading.enumerate()), "the call")
        port.server.stop()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("marble-http")]
        assert connection.recv(10) == b""
    port.server.stop()


def test_a_port_that_cannot_be_had(port: Port, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"cannot listen on 127.0.0.1:\d+ for HTTP"):
        Port(tmp_path, port.server.endpoint)
    with pytest.raises(UsageError, match=r"cannot listen on 203.0.113.1:0 for HTTP"):
        Port(tmp_path, "203.0.113.1:0")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"endpoint": "nonsense"}, r"\[node.http\] endpoint 'nonsense' has no port"),
        ({"endpoint": "127.0.0.1:0", "pages": {"0": "http://a/"}}, "node id in"),
        ({"endpoint": "127.0.0.1:0", "pages": {"2": "javascript:alert(1)"}}, r"\[node.http.pages\] 2 must be a URL"),
        ({"endpoint": "127.0.0.1:0", "pages": {"2": 'http://a/"><script>'}}, r"\[node.http.pages\] 2 must be a URL"),
        ({"endpoint": "127.0.0.1:0", "pages": 3}, "must be a table"),
    ],
)
def test_a_wrong_config_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        HttpConfig(**values)


def test_the_config_names_port_and_pages() -> None:
    config = HttpConfig("LOCALHOST:9001", {"2": "http://10.0.0.2:9001/", 3: "https://node-3.example"})  # type: ignore[dict-item]
    assert config.endpoint == "localhost:9001"
    assert config.pages == {2: "http://10.0.0.2:9001/", 3: "https://node-3.example"}


def test_a_file_names_port_and_pages(tmp_path: Path) -> None:
    text = """
[node]
id = 1
data_dir = "data"
[node.http]
endpoint = "127.0.0.1:9001"
[node.http.pages]
2 = "http://10.0.0.2:9001/"
[cluster]
cluster_id = "c"
node_endpoints = ["127.0.0.1:5001"]
"""
    assert parse_config(text, tmp_path).http == HttpConfig("127.0.0.1:9001", {2: "http://10.0.0.2:9001/"})
    with pytest.raises(UsageError, match=r"unknown key 'endpiont' in \[node.http\]: did you mean 'endpoint'"):
        parse_config(text.replace("endpoint = ", "endpiont = ", 1), tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_make_the_port_fail(data: bytes) -> None:
    with contextlib.closing(_shared()) as port:
        answer = port.raw(data + b"\r\n\r\n")
        assert answer == b"" or answer.startswith(b"HTTP/1.")
        assert port.ask("/healthz")[0] == 200


class _SharedPort(Port):
    def close(self) -> None:
        """Stays open: the next example uses it."""


_ports: list[_SharedPort] = []


def _shared() -> _SharedPort:
    if not _ports:
        _ports.append(_SharedPort(Path(), limits=HttpLimits(request_s_max=1.0)))
    return _ports[0]


@pytest.fixture(scope="module", autouse=True)
def _end_shared() -> Iterator[None]:
    yield
    while _ports:
        _ports.pop().server.stop()


def test_a_node_shows_what_it_does(tmp_path: Path) -> None:
    server = create_raft_server(data_dir=tmp_path, node_id=1, http="127.0.0.1:0")
    server.initialize(RaftClusterConfig("c", free_endpoints(1)))
    with server:
        server.start()
        server.wait_for_leader()
        url = server.page_url
        assert url is not None
        table = server.database.create_table("t", pa.schema([("id", pa.int64())]), key=["id"])
        for each in range(20):
            table.write(pa.record_batch({"id": [each]}))
        address = url.removeprefix("http://").rstrip("/").split(":")
        shown = eventually(_moments(address[0], int(address[1])), "a moment of the history")
        assert shown["node"]["cluster_id"] == "c"
        assert shown["node"]["commit_index"] >= 21
        assert shown["peers"][0]["leads"] is True
        assert shown["health"]["ready"] is True
    with pytest.raises(UsageError, match="was stopped"):
        assert server.page_url


def test_a_node_with_tokens_wants_one_here_too(tmp_path: Path) -> None:
    tokens, secret = tmp_path / "tokens.toml", tmp_path / "secret"
    tokens.write_text('[tokens.scraper]\ntoken = "0123456789abcdef0123"\naccess = "read"\n')
    secret.write_bytes(b"s" * 32)
    tokens.chmod(0o600)
    secret.chmod(0o600)
    security = SecurityConfig(tokens=TokensConfig(tokens), secret_file=secret)
    server = create_raft_server(data_dir=tmp_path / "data", node_id=1, http="127.0.0.1:0", security=security)
    server.initialize(RaftClusterConfig("c", free_endpoints(1)))
    with server:
        server.start()
        host, port = str(server.page_url).removeprefix("http://").rstrip("/").split(":")

        def ask(path: str, **headers: str) -> int:
            with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=WAIT_S)) as connection:
                connection.request("GET", path, headers=headers)
                return connection.getresponse().status

        assert ask("/healthz") == 200
        assert ask("/metrics") == ask("/api/status", Authorization="Bearer wrong-token-wrong") == 401
        assert ask("/metrics", Authorization="Bearer 0123456789abcdef0123") == 200


def _moments(host: str, port: int) -> Callable[[], dict[str, Any] | None]:
    def ask() -> dict[str, Any] | None:
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=WAIT_S)) as connection:
            connection.request("GET", "/api/status")
            shown: dict[str, Any] = json.loads(connection.getresponse().read())
        return shown if sum(shown["moments"]["writes"]) > 0 else None

    return ask


def test_the_embedded_database_has_a_page_too(tmp_path: Path) -> None:
    with marble.open(tmp_path, http="127.0.0.1:0") as database:
        host, port = str(database.status()["page"]).removeprefix("http://").rstrip("/").split(":")
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=WAIT_S)) as connection:
            connection.request("GET", "/readyz")
            assert connection.getresponse().status == 200
    with pytest.raises(UsageError, match="has no port"):
        marble.open(tmp_path, http="nonsense")
    marble.open(tmp_path).close()


def test_edges_are_decimal() -> None:
    assert {1e-6, 0.001, 0.1, 1.0, 1000.0} < set(EDGES)
