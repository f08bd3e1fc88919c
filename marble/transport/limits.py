"""What a stranger may send and for how long one may keep a node waiting: the limits that Arrow's server has no setting for.

`marble.transport._gate` applies them inside the server, on the layouts of one release of Arrow; `Gate` is its Python side, and knows
on which releases that was tried.

Rule 1: on any other release, and wherever Arrow or gRPC are not laid out as known, the server is Arrow's own: messages of any size
are taken, compressed batches are unpacked before they are measured, and the log says so once.
Rule 2: who does not read what it asked for is dropped with its connection: gRPC lets nobody else cancel a call that waits in a write.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import socket
import struct
import urllib.parse
from collections.abc import Iterator
from typing import Final

import pyarrow as pa

from marble.transport import _gate

TRIED: Final = ("26.0.",)
"""Releases of pyarrow on which the gate was tried."""

MESSAGE_MARGIN_BYTES: Final = 4 * 1024 * 1024
"""What a gRPC message holds beside the buffers of its batch: headers of columns, and ``app_metadata``."""

SCHEMA_BYTES_MAX: Final = 4 * 1024 * 1024
"""The message of a schema: twice what the largest table's takes (4096 fields with names of 256 bytes), the rest is for metadata,
which is dropped. Arrow's objects for a schema of as many fields as fit take some 20 MiB."""

MESSAGE_BYTES_MAX: Final = 2**31 - 1
"""gRPC counts in a C int."""

_SO_ATTACH_REUSEPORT_CBPF: Final = 51
_BPF_RETURN: Final = 0x06
"""Linux's names for them; Python has none."""

_log = logging.getLogger("marble.transport")
_numbers = itertools.count(1)
_registered: list[bool] = []


class Gate:
    """Limits of one server, from before it is made until `close`.

    Parameters
    ----------
    unpacked_bytes_max
        Bytes of a record batch when it is unpacked; a message that is not compressed has `MESSAGE_MARGIN_BYTES` more.
    shares_port
        Whether it takes over a port from another server of this process; see `share_port`.
    """

    def __init__(self, unpacked_bytes_max: int, *, shares_port: bool = False) -> None:
        self._number = next(_numbers)
        self._used = pa.__version__.startswith(TRIED)
        if self._used:
            if not _registered:
                _gate.register()
                _registered.append(True)
            message_bytes_max = min(MESSAGE_BYTES_MAX, unpacked_bytes_max + MESSAGE_MARGIN_BYTES)
            _gate.add(self._number, message_bytes_max, unpacked_bytes_max, SCHEMA_BYTES_MAX, shares_port)

    def location(self, endpoint: str, *, tls: bool) -> str:
        """Where a server with these limits is to listen: a Flight URI."""
        if not self._used:
            return f"{'grpc+tls' if tls else 'grpc'}://{endpoint}"
        return f"{'marble+tls' if tls else 'marble'}://{endpoint}?gate={self._number}"

    @property
    def holds(self) -> bool:
        """Whether gRPC took the limits; asked when the server is made."""
        return self._used and _gate.ask(self._number)[1] == 1

    @property
    def looks_inside(self) -> bool:
        """Whether the last stream that came in is looked at before it is unpacked."""
        return self._used and _gate.ask(self._number)[2] == 1

    @property
    def refused(self) -> int:
        """Messages that were refused before they were unpacked."""
        return _gate.ask(self._number)[0] if self._used else 0

    def slow(self, seconds: float) -> list[str]:
        """Who has kept this server waiting in a write for longer than `seconds`, as gRPC names them."""
        return _gate.slow(self._number, seconds) if self._used else []

    def report(self, node_id: int) -> None:
        """Say in the log if the limits do not hold."""
        if not self.holds:
            _log.warning(
                "node %d limits neither the size of messages nor what they unpack to: that was tried with pyarrow %sx, this is %s",
                node_id,
                TRIED[-1],
                pa.__version__,
            )

    def close(self) -> None:
        """Forget the limits. Idempotent."""
        if self._used:
            _gate.drop(self._number)


def share_port(port: int) -> None:
    """Let the server of this process that listens at `port` be joined by another one.

    It began without SO_REUSEPORT, so that no other process could listen there too by accident. Linux lets it be set later.
    """
    for listener in _listeners(port):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def prefer_newest(port: int) -> None:
    """Of two servers that listen at `port`, let the newer one get all connections from now on.

    The kernel would spread them, and those that it gave to the older one would be cut when that one stops to listen. A filter for the
    group of sockets says which is chosen: always the second. Where there is none of that number any more, the kernel takes another.
    """
    choose_second = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 1))
    program = struct.pack("HP", 1, ctypes.addressof(choose_second))
    for listener in _listeners(port):
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)


def count_listeners(port: int) -> int:
    """How many sockets of this process listen at `port`, at most at one address."""
    addresses = [listener.getsockname()[0] for listener in _listeners(port)]
    return max(map(addresses.count, addresses), default=0)


def _listeners(port: int) -> Iterator[socket.socket]:
    for found in _sockets():
        with found:
            if found.getsockname()[1] == port and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield found


def address_of(peer: str) -> tuple[str, int] | None:
    """Host and port of a `peer` as gRPC names one: ``ipv4:127.0.0.1:50000``, ``ipv6:%5B::1%5D:50000``. None for others."""
    family, _, rest = peer.partition(":")
    host, _, port = urllib.parse.unquote(rest).rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isascii() or not port.isdigit():
        return None
    return host.strip("[]").partition("%")[0], int(port)


def drop_connections(port: int, peers: set[tuple[str, int]] | None = None) -> int:
    """Break the TCP connections that this process has accepted at `port`: those with `peers`, or all; how many these were.

    Whoever reads or writes there, gRPC in this case, sees them end.
    """
    dropped = 0
    for connection in _sockets():
        with connection:
            try:
                name, other = connection.getsockname(), connection.getpeername()
            except OSError:
                # It listens, or is gone by now.
                continue
            if len(name) < 2 or name[1] != port or len(other) < 2:
                continue
            if peers is None or (other[0].removeprefix("::ffff:"), other[1]) in peers:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                    dropped += 1
    return dropped


def _sockets() -> Iterator[socket.socket]:
    """All stream sockets of this process, each by a descriptor of its own: nobody else can close that one meanwhile."""
    for name in os.listdir("/proc/self/fd"):
        try:
            # Checked on the copy: the number may mean something else by now.
            copy = os.dup(int(name))
        except OSError:
            continue
        try:
            found = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            continue
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
            yield found
        else:
            found.close()
