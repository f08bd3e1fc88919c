"""The way to a port, from the bottom: the name, the connection, and what language is spoken there.

Rule 1: every step has a deadline of its own, and says what it saw even if that is silence.
Rule 2: what comes back is a stranger's: at most `ANSWER_BYTES_MAX` of it are read, and shown only as ``repr``.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from marble.doctor.findings import Notes

ANSWER_BYTES_MAX: Final = 64
"""Enough to tell HTTP/2, TLS, HTTP/1 and everything else apart."""

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""How a client of HTTP/2 opens a connection (RFC 9113 §3.4), with empty settings: it asks for nothing."""

_SETTINGS_TYPE: Final = 4
_FRAME_TYPE_AT: Final = 3
_TLS_RECORDS: Final = (0x15, 0x16)


class Speech(enum.Enum):
    """What a port speaks."""

    PLAIN = "HTTP/2 without TLS"
    TLS = "TLS"
    OTHER = "something else"


class Address(NamedTuple):
    """One address of a name, as `socket.getaddrinfo` gives it."""

    family: int
    place: tuple[Any, ...]

    @property
    def text(self) -> str:
        return str(self.place[0])


def find_addresses(notes: Notes, host: str, port: int, timeout_s: float) -> list[Address]:
    """All addresses of `host`; none, with the reason noted, if there are none."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.append(error)
        except UnicodeError as error:
            answers.append(socket.gaierror(socket.EAI_NONAME, str(error)))

    # The resolver takes no deadline; a thread that it holds up ends with it.
    thread = threading.Thread(target=ask, name="marble-doctor-name", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not answers:
        notes.problem(
            "name",
            f"the name {host!r} was not resolved within {timeout_s:g} s: the name server does not answer",
            "look at /etc/resolv.conf and the way to the name server, or use the IP address",
        )
        return []
    answer = answers[0]
    if isinstance(answer, OSError):
        if getattr(answer, "errno", None) == socket.EAI_AGAIN:
            advice = "the name server could not be asked: look at /etc/resolv.conf, or use the IP address"
        else:
            advice = "look for a slip in the name; else add it to DNS or /etc/hosts, or use the IP address"
        notes.problem("name", f"the name {host!r} is not known here ({answer.strerror or answer})", advice)
        return []
    found = list(dict.fromkeys(Address(int(family), place) for family, _, _, _, place in answer))
    shown = ", ".join(address.text for address in found)
    if shown != host:
        notes.good("name", f"{host} is {shown}")
    return found


def connect(notes: Notes, addresses: list[Address], timeout_s: float) -> list[Address]:
    """Those of `addresses` to which a connection can be made; what is wrong with the others is noted."""
    good, bad = [], []
    for address in addresses:
        try:
            with open_socket(address, timeout_s):
                good.append(address)
        except OSError as error:
            bad.append((address, *_why_not(error, timeout_s)))
    for address, words, advice in bad:
        if good:
            notes.warn("connect", f"{address.text}: {words}", f"clients that try this address first wait: {advice}")
        else:
            notes.problem("connect", words if len(addresses) == 1 else f"{address.text}: {words}", advice)
    if good:
        notes.good("connect", f"accepts connections at {', '.join(address.text for address in good)}")
    return good


def _why_not(error: OSError, timeout_s: float) -> tuple[str, str]:
    if isinstance(error, ConnectionRefusedError):
        return (
            "the connection is refused: the machine answers, and nothing listens on this port",
            "start the node (`marble serve`), or look in its log for why it ended; check the port, and that [node] listen is not "
            "127.0.0.1 while others are to reach it",
        )
    if isinstance(error, TimeoutError):
        return (
            f"no answer within {timeout_s:g} s: a firewall drops what is sent there, or the machine is down or elsewhere",
            "check the address, that the machine is up, and that firewalls and security groups let this TCP port through",
        )
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL):
        return (
            f"there is no way from here to that address ({error.strerror})",
            "check the address, and this machine's network, VPN and routes",
        )
    return f"no connection: {error.strerror or error}", "check the address and the port"


@contextlib.contextmanager
def open_socket(address: Address, timeout_s: float) -> Iterator[socket.socket]:
    """A connection to `address`; each wait on it takes at most `timeout_s`."""
    with contextlib.closing(socket.socket(address.family, socket.SOCK_STREAM)) as connection:
        connection.settimeout(timeout_s)
        connection.connect(address.place)
        yield connection


def listen_to(connection: socket.socket, timeout_s: float) -> bytes | None:
    """The first bytes that come within `timeout_s`: b"" if the other side closes, None if it is silent."""
    deadline = time.monotonic() + timeout_s
    got = b""
    while len(got) < ANSWER_BYTES_MAX:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        connection.settimeout(left)
        try:
            more = connection.recv(ANSWER_BYTES_MAX - len(got))
        except TimeoutError:
            break
        if not more:
            return got
        got += more
        if is_http2(got) or len(got) >= 2 * _FRAME_TYPE_AT:
            break
    return got or None


def is_http2(answer: bytes) -> bool:
    """Whether these are the first bytes of a server of HTTP/2: its SETTINGS."""
    return len(answer) > _FRAME_TYPE_AT and answer[_FRAME_TYPE_AT] == _SETTINGS_TYPE and answer[0] == 0


def hear_speech(notes: Notes, address: Address, timeout_s: float) -> Speech | None:
    """What `address` speaks, as far as a client without TLS can hear it; None, with the reason noted, if it says nothing.

    A port that speaks TLS may close without a word: that is `Speech.OTHER`, noted by nobody yet.
    """
    try:
        with open_socket(address, timeout_s) as connection:
            connection.sendall(PREFACE)
            answer = listen_to(connection, timeout_s)
    except OSError:
        # Reset by what did not like the preface.
        answer = b""
    if answer is None:
        return None
    if is_http2(answer):
        return Speech.PLAIN
    if answer[:1] and answer[0] in _TLS_RECORDS and answer[1:2] == b"\x03":
        return Speech.TLS
    if answer.startswith(b"HTTP/1"):
        notes.problem(
            "speech",
            "a web server (HTTP/1) listens on this port, not a node's Flight port",
            "this may be the node's [node.http] port, or another program: use the port of [node] endpoint",
        )
    elif answer:
        notes.problem(
            "speech",
            f"another program listens on this port: it answers {answer[:24]!r}",
            "check the port; `ss -ltnp` on that machine says which program has it",
        )
    return Speech.OTHER
