"""The HTTP port of a node: health for supervisors, metrics for Prometheus, a page for people. Reads only.

Rule 1: nothing from the network is trusted, and nothing of it costs more than `HttpLimits` says: connections, bytes of a
request, seconds from the first byte to the last. One connection carries one request.
Rule 2: the port listens on the loopback interface unless somebody wrote another address into the configuration. There it also
refuses requests that were made for another host name: a page of a stranger, whose name was pointed at this machine, learns nothing.
Rule 3: everything that the page needs comes from this port; its Content-Security-Policy forbids the rest.

=================  ==========================================================================================================
``/``              the page, with ``/page.js``, ``/page.css`` and ``/icon.svg``
``/healthz``       200 while the process works, else 503; JSON with the components
``/readyz``        200 while clients can be served, else 503; the same JSON
``/metrics``       Prometheus' text
``/api/status``    JSON for the page; ``?after=SECONDS`` leaves out the moments that it has already
=================  ==========================================================================================================

Threads: ``marble-http-N`` accepts, ``marble-http-N-call`` (one for each connection) answers; from `HttpServer.start` to
`HttpServer.stop`, which closes connections that have not ended.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib.resources
import ipaddress
import json
import logging
import math
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from marble.config import HttpConfig, format_endpoint, parse_endpoint
from marble.errors import MarbleError, UnavailableError, UsageError
from marble.sampling import columns, peers
from marble.web import exposition
from marble.web.health import as_json, is_live, is_ready
from marble.web.observer import Observer

logger = logging.getLogger("marble.server")

Authorize = Callable[[str | None], bool]
"""Whether a request with this ``Authorization`` header may read metrics and the status."""

JSON_TYPE: Final = "application/json; charset=utf-8"
_STATIC: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What strangers can have of the port."""

    connections_max: int = 32
    """Each has a thread. One more is told so and closed."""
    request_bytes_max: int = 8192
    """Request line and headers together; there is no body."""
    request_s_max: float = 5.0
    """From the connection to the end of the answer."""


class HttpServer:
    """The port of one node. `start` and `stop` belong to one caller.

    Parameters
    ----------
    observer
        Who looks at the node.
    config
        Where to listen, and links to the others' pages.
    authorize
        Who may read metrics and the status; everybody if None. Health is told to all.
    limits
        What strangers can have.

    Raises
    ------
    UsageError
        If the endpoint is malformed or names an address that this machine does not have.
    UnavailableError
        If the port is in use.
    """

    def __init__(
        self,
        observer: Observer,
        config: HttpConfig,
        authorize: Authorize | None = None,
        limits: HttpLimits | None = None,
    ) -> None:
        host, port = parse_endpoint(config.endpoint, free_port=True)
        try:
            self._listener = _Listener((host, port), observer, config.pages, authorize, limits or HttpLimits())
        except OSError as error:
            if isinstance(error, socket.gaierror) or "assign" in str(error):
                raise UsageError(f"cannot listen on {config.endpoint} for HTTP: {error}") from None
            raise UnavailableError(f"cannot listen on {config.endpoint} for HTTP: {error}") from None
        self.endpoint: Final = format_endpoint(host, self._listener.server_address[1])
        """``host:port``, with the port that was taken."""
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(0.2,), name=f"marble-http-{observer.node_id}", daemon=True
        )

    @property
    def url(self) -> str:
        """Of the page."""
        host, port = parse_endpoint(self.endpoint)
        # Who listens everywhere is found at home, too.
        return f"http://{format_endpoint({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), port)}/"

    def start(self) -> None:
        """Answer, on threads of its own."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Free the port and close what is open. Idempotent."""
        if self._thread.is_alive():
            self._listener.shutdown()
            self._thread.join(timeout_s)
        self._listener.server_close()
        self._listener.end_connections(timeout_s)


class _Listener(http.server.HTTPServer):
    """Accepts, counts and ends connections."""

    request_queue_size = 16
    allow_reuse_address = True

    def __init__(
        self,
        place: tuple[str, int],
        observer: Observer,
        pages: Mapping[int, str],
        authorize: Authorize | None,
        limits: HttpLimits,
    ) -> None:
        self.observer = observer
        self.pages = pages
        self.authorize = authorize
        self.limits = limits
        self.static = _load_static()
        found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        self.loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
        self._lock = threading.Lock()
        self._open: dict[socket.socket, tuple[threading.Thread, float]] = {}
        self._refused = observer.metrics.counter("http_refused")
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]  # (host, port), also of IPv6

    def server_bind(self) -> None:
        # The base class would ask the name service who we are.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._open) >= self.limits.connections_max
            if not full:
                name = f"marble-http-{self.observer.node_id}-call"
                thread = threading.Thread(target=self._serve, args=(request, client_address), name=name, daemon=True)
                self._open[request] = (thread, time.monotonic() + self.limits.request_s_max)
        if full:
            self._refused.add()
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        thread.start()

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(self.limits.request_s_max)
            self.finish_request(request, client_address)
        except (OSError, ValueError):
            # The caller has gone, or was too slow: nobody is left to be told.
            logger.debug("a connection from %s ended early", client_address)
        except Exception:
            logger.exception("a request could not be answered")
        finally:
            with self._lock:
                self._open.pop(request, None)
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """Called several times a second: whoever takes too long, byte by byte, is cut off."""
        self._cut(time.monotonic())

    def _cut(self, now: float) -> list[threading.Thread]:
        with self._lock:
            late = [(request, thread) for request, (thread, until) in self._open.items() if until <= now]
        for request, _ in late:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        return [thread for _, thread in late]

    def end_connections(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in self._cut(math.inf):
            thread.join(max(0.0, deadline - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("a connection from %s could not be taken", client_address)


def _load_static() -> dict[str, tuple[bytes, str]]:
    folder = importlib.resources.files("marble.web") / "static"
    return {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in _STATIC.items()}


class _TooLargeError(Exception):
    """A request has more bytes than it may have."""


class _Bounded:
    """The request as it comes in, up to a size."""

    def __init__(self, file: Any, nbytes: int) -> None:
        self._file = file
        self._left = nbytes

    def readline(self, limit: int = -1) -> bytes:
        line: bytes = self._file.readline(self._left if limit < 0 else min(limit, self._left))
        self._left -= len(line)
        if not self._left:
            raise _TooLargeError
        return line

    def read(self, nbytes: int = -1) -> bytes:
        return b""

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    # What exactly runs here is nobody's business.
    server_version = "marble"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile = _Bounded(self.rfile, self.server.limits.request_bytes_max)  # type: ignore[assignment]

    def handle(self) -> None:
        self.close_connection = True
        try:
            self.handle_one_request()
        except _TooLargeError:
            self.command, self.requestline, self.request_version = "GET", "", "HTTP/1.1"
            self.send_error(431)

    def do_GET(self) -> None:
        # `handle_one_request` takes a header that says keep-alive as a wish; it is not granted.
        self.close_connection = True
        if self.request_version == "HTTP/0.9":
            self.send_error(400)
            return
        try:
            url = urllib.parse.urlsplit(self.path)
        except ValueError:
            self.send_error(400)
            return
        try:
            status, kind, body = self._answer(url.path, url.query)
        except UsageError as error:
            status, kind, body = _failure(501 if "marbledb[server]" in str(error) else 400, str(error))
        except MarbleError as error:
            status, kind, body = _failure(503, str(error))
        self._send(status, kind, body)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, path: str, query: str) -> tuple[int, str, bytes]:
        if not self._is_for_us():
            return _failure(421, "this port answers for localhost and addresses only")
        if path in self.server.static:
            body, kind = self.server.static[path]
            return 200, kind, body
        observer = self.server.observer
        if path in ("/healthz", "/readyz"):
            checks = observer.health()
            good = is_live(checks) if path == "/healthz" else is_ready(checks)
            return (200 if good else 503), JSON_TYPE, _json(as_json(checks))
        if path not in ("/metrics", "/api/status"):
            return _failure(404, "there is /, /healthz, /readyz, /metrics and /api/status")
        authorize = self.server.authorize
        if authorize is not None and not authorize(self.headers.get("Authorization")):
            return _failure(401, "send a token: Authorization: Bearer ...")
        if path == "/metrics":
            return 200, exposition.CONTENT_TYPE, exposition.text(observer).encode()
        return 200, JSON_TYPE, _json(picture(observer, _after(query), self.server.pages))

    def _is_for_us(self) -> bool:
        if not self.server.loopback:
            return True
        host = self.headers.get("Host")
        if host is None:
            return self.request_version == "HTTP/1.0"
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.server.observer.metrics.counter("http_requests", code=status).add()
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Bearer realm="marble"')
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class says of a malformed request, and of a method that there is none of."""
        self.close_connection = True
        self.command = self.command or "GET"
        if (
            self.request_version == "HTTP/0.9"
        ):  # So the base class calls what has no version, and answers without headers.
            self.request_version = "HTTP/1.0"
        code = 405 if code == 501 else code
        self._send(*_failure(code, http.client.responses.get(code, "error")))

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Requests are counted, not logged: what is in them is a stranger's."""


def picture(observer: Observer, after: float, pages: Mapping[int, str]) -> dict[str, Any]:
    """What the page shows: the node, its peers, its health, and the moments of its history later than `after`."""
    checks = observer.health()
    status = observer.look()
    known = {key: status.get(key) for key in _SHOWN} if status else {"node_id": observer.node_id}
    return {
        "node": known,
        "peers": [
            {slot: getattr(peer, slot) for slot in peer.__slots__} | {"page": pages.get(peer.node)}
            for peer in (peers(status) if status else ())
        ],
        "health": as_json(checks),
        "uptime_s": round(observer.uptime_s, 3),
        "moments": columns(observer.moments(after)),
    }


_SHOWN: Final = (
    "cluster_id",
    "node_id",
    "endpoint",
    "role",
    "term",
    "leader_id",
    "leader_endpoint",
    "members",
    "learners",
    "joint",
    "last_index",
    "commit_index",
    "applied_index",
    "snapshot_index",
    "log_bytes",
    "memory_bytes",
    "sessions",
    "wall_us",
)


def _after(query: str) -> float:
    """The number in ``after=...``; -1.0 if there is none."""
    given = urllib.parse.parse_qs(query, max_num_fields=4).get("after", ["-1"])[0]
    try:
        after = float(given)
    except ValueError:
        raise UsageError("after must be a number of seconds") from None
    return after if math.isfinite(after) else -1.0


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _failure(status: int, message: str) -> tuple[int, str, bytes]:
    return status, JSON_TYPE, _json({"error": message})
