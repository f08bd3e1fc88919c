"""The bad line itself: what it does to bytes is what it says, or tests over it show nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from marble.errors import UsageError
from marble.testing.relay import Line, Relay, RelayProcess, _Direction

DEADLINE_S = 30.0


class Echo:
    """A target that gives back what it gets, until the other end has said all."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, name="echo")
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(DEADLINE_S)
                try:
                    if connection.recv(1, socket.MSG_PEEK) == b"Q":
                        return
                    while data := connection.recv(1 << 16):
                        connection.sendall(data)
                except ConnectionError:
                    continue

    def stop(self) -> None:
        host, _, port = self.endpoint.rpartition(":")
        with socket.create_connection((host, int(port)), DEADLINE_S) as last:
            last.sendall(b"Q")
            self._thread.join(DEADLINE_S)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    target = Echo()
    yield target
    target.stop()


def call(endpoint: str) -> socket.socket:
    host, _, port = endpoint.rpartition(":")
    return socket.create_connection((host, int(port)), DEADLINE_S)


def read_exactly(connection: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        piece = connection.recv(count - len(got))
        assert piece, f"the end after {len(got)} of {count} bytes"
        got += piece
    return got


def test_bytes_arrive_as_they_were_and_the_end_arrives(echo: Echo) -> None:
    data = bytes(range(256)) * 4096
    with Relay(echo.endpoint) as relay, call(relay.endpoint) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        assert read_exactly(connection, len(data)) == data
        sender.join(DEADLINE_S)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        assert relay.counts() == {"accepted": 1, "passed_there": len(data), "passed_back": len(data), "flipped": 0}


def test_delay_and_rate_hold_bytes_back_at_least_so_long(echo: Echo) -> None:
    with Relay(echo.endpoint, there=Line(delay_s=0.03), back=Line(delay_s=0.05)) as relay:
        with call(relay.endpoint) as connection:
            begun = time.monotonic()
            connection.sendall(b"x")
            read_exactly(connection, 1)
            assert time.monotonic() - begun >= 0.08
            relay.set(there=Line(bytes_per_s=1e6), back=Line())
            begun = time.monotonic()
            connection.sendall(bytes(200_000))
            read_exactly(connection, 200_000)
            # The last bit left after 0.2 s.
            assert time.monotonic() - begun >= 0.2


def test_connections_share_the_line_fairly() -> None:
    """One that always has something to say does not keep the others from it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            Relay(target, there=Line(bytes_per_s=4e6)) as relay,
            call(relay.endpoint) as many,
            call(relay.endpoint) as few,
        ):
            stopping = threading.Event()

            def flood() -> None:
                with contextlib.suppress(OSError):
                    while not stopping.is_set():
                        many.sendall(bytes(1 << 16))

            def drain(connection: socket.socket) -> None:
                with connection, contextlib.suppress(OSError):
                    while connection.recv(1 << 16):
                        pass

            ends = [listener.accept()[0] for _ in range(2)]
            # Which of the two ends belongs to whom is told by the first byte.
            many.sendall(b"m")
            few.sendall(b"f")
            ends.sort(key=lambda end: end.recv(1))
            threads = [threading.Thread(target=flood), threading.Thread(target=drain, args=(ends[1],))]
            for thread in threads:
                thread.start()
            for end in ends:
                end.settimeout(DEADLINE_S)
            few.sendall(bytes(1 << 19))
            with ends[0]:
                read_exactly(ends[0], 1 << 19)
            stopping.set()
            relay.reset()
            for thread in threads:
                thread.join(DEADLINE_S)


def test_silence_holds_bytes_and_lets_them_go(echo: Echo) -> None:
    with Relay(echo.endpoint) as relay, call(relay.endpoint) as connection:
        connection.sendall(b"a")
        read_exactly(connection, 1)
        relay.set(back=Line(silent=True))
        connection.sendall(b"bc")
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(DEADLINE_S)
        relay.set(back=Line())
        assert read_exactly(connection, 2) == b"bc"


def test_reset_breaks_what_is_there_and_takes_what_comes(echo: Echo) -> None:
    with Relay(echo.endpoint) as relay:
        with call(relay.endpoint) as connection:
            connection.sendall(b"a")
            read_exactly(connection, 1)
            relay.reset()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        with call(relay.endpoint) as connection:
            connection.sendall(b"b")
            assert read_exactly(connection, 1) == b"b"
        relay.refuse()
        # The reset may be here before the connection is known to stand.
        with pytest.raises(ConnectionResetError), call(relay.endpoint) as connection:
            connection.recv(1)


def test_target_that_is_away_is_a_reset() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        with Relay(target) as relay, pytest.raises(ConnectionResetError), call(relay.endpoint) as connection:
            connection.recv(1)


def flipped_at(sent: bytes, got: bytes) -> list[int]:
    return [at for at, (one, other) in enumerate(zip(sent, got, strict=True)) if one != other]


def test_flips_are_single_bits_and_those_of_the_seed() -> None:
    data = bytes(200_000)
    whole = _Direction(Line(flip_chance=1e-3), 7).take(data, 0.0)[1]
    pieces = _Direction(Line(flip_chance=1e-3), 7)
    cut = b"".join(pieces.take(data[at : at + 999], 0.0)[1] for at in range(0, len(data), 999))
    assert cut == whole
    where = flipped_at(data, whole)
    assert 120 < len(where) < 300
    assert pieces.flipped == len(where)
    assert all(whole[at].bit_count() == 1 for at in where)
    assert _Direction(Line(flip_chance=1e-3), 8).take(data, 0.0)[1] != whole


def test_process_does_as_the_relay_does(echo: Echo) -> None:
    with RelayProcess(echo.endpoint, back=Line(delay_s=0.02), seed=3) as relay:
        with call(relay.endpoint) as connection:
            begun = time.monotonic()
            connection.sendall(b"abc")
            assert read_exactly(connection, 3) == b"abc"
            assert time.monotonic() - begun >= 0.02
            assert relay.counts()["passed_back"] == 3
            relay.set(there=Line(flip_chance=0.5), back=Line())
            connection.sendall(bytes(1000))
            assert any(read_exactly(connection, 1000))
            relay.reset()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        assert relay.stop()


def test_stop_ends_the_thread_while_ends_hang(echo: Echo) -> None:
    relay = Relay(echo.endpoint, there=Line(silent=True))
    with call(relay.endpoint) as connection:
        connection.sendall(b"a")
        assert relay.stop()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert relay.stop()
    relay.set(back=Line())


@pytest.mark.parametrize("wrong", [{"delay_s": -1.0}, {"bytes_per_s": 0.0}, {"flip_chance": 1.0}])
def test_lines_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Line(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        Relay("nowhere")
