"""A bad line between two real sockets: a TCP relay on loopback that delays, limits, silences, resets and flips bits.

The kernels that tests run on often have no ``netem``; what it would do to packets this does to streams. It ends TCP at both
of its sides, so what the line's delay does to HTTP/2 windows and to questions and answers is seen, and what it does to
TCP's own windows is not.

Rule 1: a line never loses or reorders bytes, since no TCP line does. Silence holds them back, as a partition does, and they
go on when it is lifted; `Relay.reset` is how they are lost, together with their connection.
Rule 2: one thread ("marble-relay-…") does everything. `Relay.stop` returns within its deadline whatever the ends do.

Invariants:
- All connections of a relay share its line: `Line.bytes_per_s` bounds their sum, in each direction by itself. Those that have something to
  say take turns, a piece each: none starves while others say much.
- What waits inside for its turn on the line is at most `QUEUE_S` of it; beyond that the relay reads no further, and the
  sender feels it.
- A seed gives the same flips at the same bytes of a direction, however they are cut into pieces.

As a process of its own, so that a slow test does not slow the line: `RelayProcess`, or ``python -m marble.testing.relay HOST:PORT``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from marble.env import SystemRandom
from marble.errors import UsageError

PIECE_BYTES: Final = 64 << 10
"""What is read of one connection before the others have their turn."""
QUEUE_S: Final = 0.02
"""How much of the line's time may be taken by bytes that wait for it: a router's buffer."""
QUEUE_BYTES: Final = 4 << 20
"""What waits of one direction of one connection for an end that does not read, beside what is on the line."""
_CHANCE_STEPS: Final = 1 << 53
_ABORT: Final = struct.pack("ii", 1, 0)
_COUNTS: Final = ("accepted", "passed_there", "passed_back", "flipped")


@dataclass(frozen=True, slots=True)
class Line:
    """One direction of a line.

    - ``delay_s``: from when the last bit of a piece left its sender to when it arrives.
    - ``bytes_per_s``: None for no limit.
    - ``silent``: nothing arrives any more, until this is lifted.
    - ``flip_chance``: of each byte to have one of its bits turned, 0 to below 1.
    """

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    silent: bool = False
    flip_chance: float = 0.0

    def __post_init__(self) -> None:
        if self.delay_s < 0 or (self.bytes_per_s is not None and self.bytes_per_s <= 0):
            raise UsageError(f"a line has no negative delay and a rate above 0, unlike {self}")
        if not 0 <= self.flip_chance < 1:
            raise UsageError(f"flip_chance {self.flip_chance} is not from 0 to below 1")


class _Direction:
    """All that goes one way: the line's state, which its connections share."""

    def __init__(self, line: Line, seed: int) -> None:
        self.line = line
        self.free_at = 0.0
        self.passed = 0
        self.flipped = 0
        self._random = SystemRandom(seed)
        self._until_flip = self._gap()

    def set(self, line: Line) -> None:
        if line.flip_chance != self.line.flip_chance:
            self.line = line
            self._until_flip = self._gap()
        self.line = line

    def take(self, data: bytes, now: float) -> tuple[float, bytes]:
        """When `data` arrives, and as what."""
        rate = self.line.bytes_per_s
        self.free_at = max(self.free_at, now) + (len(data) / rate if rate else 0.0)
        self.passed += len(data)
        return self.free_at + self.line.delay_s, self._flip(data)

    def _gap(self) -> int:
        """Bytes that stay as they are before the next one that does not: geometric, so that pieces do not matter."""
        chance = self.line.flip_chance
        if not chance:
            return sys.maxsize
        uniform = (self._random.randrange(0, _CHANCE_STEPS) + 0.5) / _CHANCE_STEPS
        return int(math.log(uniform) / math.log1p(-chance))

    def _flip(self, data: bytes) -> bytes:
        if self._until_flip >= len(data):
            self._until_flip -= 0 if self._until_flip == sys.maxsize else len(data)
            return data
        turned = bytearray(data)
        while self._until_flip < len(data):
            turned[self._until_flip] ^= 1 << self._random.randrange(0, 8)
            self.flipped += 1
            self._until_flip += 1 + self._gap()
        self._until_flip -= len(data)
        return bytes(turned)


class _Pipe:
    """One direction of one connection: what was read at `source` and is still to be written at `sink`."""

    def __init__(self, direction: _Direction, source: socket.socket, sink: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        self.held: deque[tuple[float, memoryview]] = deque()
        self.held_bytes = 0
        self.ended = False
        """`source` says nothing more."""
        self.done = False
        """And `sink` has been told."""

    def room_at(self, now: float) -> float:
        """When this direction may read again; infinity while it has no room, or nothing to read."""
        line = self.direction.line
        on_line = (line.bytes_per_s or 0.0) * (line.delay_s + QUEUE_S)
        if self.ended or self.held_bytes > QUEUE_BYTES + on_line:
            return math.inf
        # A thousandth more, or rounding lets the loop spin.
        return now if self.direction.free_at - now <= QUEUE_S else self.direction.free_at - QUEUE_S + 0.001

    def due_at(self) -> float:
        """When there is something to write; infinity for never."""
        return math.inf if self.direction.line.silent or not self.held else self.held[0][0]

    def read(self, now: float) -> None:
        try:
            data = self.source.recv(PIECE_BYTES)
        except BlockingIOError:
            return
        # An empty piece is the end of what `source` says; it travels like any other.
        self.ended = not data
        due, data = self.direction.take(data, now)
        self.held.append((due, memoryview(data)))
        self.held_bytes += len(data)

    def write(self, now: float) -> bool:
        """Write what is due; whether the sink took all of it."""
        while self.due_at() <= now:
            due, data = self.held.popleft()
            if not data:
                self.done = True
                self.sink.shutdown(socket.SHUT_WR)
                break
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            self.held_bytes -= sent
            if sent < len(data):
                self.held.appendleft((due, data[sent:]))
                return False
        return True


class _Connection:
    """A client's socket, one to the target, and the two pipes between them."""

    def __init__(self, there: _Direction, back: _Direction, near: socket.socket, far: socket.socket) -> None:
        self.ends = (near, far)
        self.pipes = (_Pipe(there, near, far), _Pipe(back, far, near))
        self.connecting = True
        self.had_turn = False
        """Whether something was read in the last turn."""
        self.watched: dict[socket.socket, int] = {}

    def turn(self, now: float, ready: dict[socket.socket, int]) -> dict[socket.socket, int]:
        """Move what can be moved; for what events each end is watched next."""
        near, far = self.ends
        wanted = {near: 0, far: 0}
        self.had_turn = False
        if self.connecting:
            if not ready.get(far, 0) & selectors.EVENT_WRITE:
                return {near: 0, far: selectors.EVENT_WRITE}
            if error := far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, "the target does not answer")
            self.connecting = False
        for pipe in self.pipes:
            if ready.get(pipe.source, 0) & selectors.EVENT_READ and pipe.room_at(now) <= now:
                pipe.read(now)
                self.had_turn = True
            if not pipe.write(now):
                wanted[pipe.sink] |= selectors.EVENT_WRITE
            if pipe.room_at(now) <= now:
                wanted[pipe.source] |= selectors.EVENT_READ
        return wanted

    def next_at(self, now: float) -> float:
        """When something happens here that no socket tells."""
        if self.connecting:
            return math.inf
        times = [time_ for pipe in self.pipes for time_ in (pipe.room_at(now), pipe.due_at())]
        return min((time_ for time_ in times if time_ > now), default=math.inf)

    @property
    def done(self) -> bool:
        return all(pipe.done for pipe in self.pipes)

    def abort(self) -> None:
        """Close with a reset at both ends."""
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            end.close()

    def close(self) -> None:
        for end in self.ends:
            end.close()


class Relay:
    """Listens at `endpoint`, and passes every connection on to `target`, over a line of two directions.

    Parameters
    ----------
    target
        ``host:port`` of the real thing; it is connected to anew for each connection.
    listen
        ``host:port`` to listen at; port 0 takes a free one.
    there, back
        The line from who connects to the target, and from the target back.
    seed
        Decides which bits are flipped.
    """

    def __init__(
        self,
        target: str,
        *,
        listen: str = "127.0.0.1:0",
        there: Line | None = None,
        back: Line | None = None,
        seed: int = 0,
    ) -> None:
        self._target = _address(target)
        self._there = _Direction(there or Line(), seed)
        self._back = _Direction(back or Line(), seed + 1)
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._accepted = 0
        self._refusing = False
        self._resets = 0
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(_address(listen))
        self._listener.setblocking(False)
        host, port = self._listener.getsockname()[:2]
        self.endpoint = f"{host}:{port}"
        self._waker, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakes, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"marble-relay-{port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def set(self, *, there: Line | None = None, back: Line | None = None) -> None:
        """Change the line, from the next byte read on (silence: from the next byte that is due)."""
        with self._lock:
            if there is not None:
                self._there.set(there)
            if back is not None:
                self._back.set(back)
        self._wake()

    def retarget(self, target: str) -> None:
        """Pass new connections on to `target`."""
        with self._lock:
            self._target = _address(target)

    def refuse(self, refusing: bool = True) -> None:
        """Reset new connections at once, or take them again."""
        with self._lock:
            self._refusing = refusing
        self._wake()

    def reset(self) -> None:
        """Break all connections with a TCP reset; what is on the line is lost. New ones are taken."""
        with self._lock:
            self._resets += 1
        self._wake()

    def counts(self) -> dict[str, int]:
        """``accepted`` connections, bytes ``passed_there`` and ``passed_back``, and bits ``flipped``."""
        with self._lock:
            flipped = self._there.flipped + self._back.flipped
            return dict(zip(_COUNTS, (self._accepted, self._there.passed, self._back.passed, flipped), strict=True))

    def stop(self, deadline_s: float = 5.0) -> bool:
        """Break everything, free the port, end the thread; whether it ended within `deadline_s`. Idempotent."""
        with self._lock:
            self._stopping = True
        self._wake()
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        # After the thread's end the socket is closed, and there is nobody to be woken.
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def _run(self) -> None:
        try:
            resets = 0
            ready: dict[socket.socket, int] = {}
            while True:
                with self._lock:
                    if self._stopping:
                        return
                    if resets != self._resets:
                        resets = self._resets
                        for connection in list(self._connections):
                            self._drop(connection, abort=True)
                    self._accept()
                    timeout_s = self._turn(ready)
                ready = {key.fileobj: events for key, events in self._selector.select(timeout_s)}  # type: ignore[misc]
                if self._wakes in ready:
                    with contextlib.suppress(BlockingIOError):
                        self._wakes.recv(PIECE_BYTES)
        finally:
            with self._lock:
                for connection in list(self._connections):
                    self._drop(connection, abort=True)
            self._listener.close()
            self._waker.close()
            self._wakes.close()
            self._selector.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            far = socket.socket(socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET)
            connection = _Connection(self._there, self._back, near, far)
            if self._refusing:
                connection.abort()
                continue
            for end in connection.ends:
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.connect_ex(self._target)
            self._accepted += 1
            self._connections.append(connection)

    def _turn(self, ready: dict[socket.socket, int]) -> float | None:
        """One turn of every connection; how long to wait for the next, None for as long as no socket stirs."""
        next_at = math.inf
        for connection in list(self._connections):
            now = time.monotonic()
            try:
                wanted = connection.turn(now, ready)
            except OSError:
                # One end has broken: so does the other.
                self._drop(connection, abort=True)
                continue
            if connection.done:
                self._drop(connection, abort=False)
                continue
            if connection.had_turn:
                # Others are asked first when the line has room again.
                self._connections.remove(connection)
                self._connections.append(connection)
            self._watch(connection, wanted)
            next_at = min(next_at, connection.next_at(now))
        return None if next_at == math.inf else max(0.0, next_at - time.monotonic())

    def _watch(self, connection: _Connection, wanted: dict[socket.socket, int]) -> None:
        for end, events in wanted.items():
            watched = connection.watched.get(end, 0)
            if events == watched:
                continue
            if not events:
                self._selector.unregister(end)
            elif watched:
                self._selector.modify(end, events)
            else:
                self._selector.register(end, events)
            connection.watched[end] = events

    def _drop(self, connection: _Connection, abort: bool) -> None:
        self._connections.remove(connection)
        self._watch(connection, dict.fromkeys(connection.ends, 0))
        connection.abort() if abort else connection.close()


def _address(endpoint: str) -> tuple[str, int]:
    host, colon, port = endpoint.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"{endpoint!r} is not an endpoint: expected host:port")
    return host.strip("[]"), int(port)


class RelayProcess:
    """A `Relay` in a process of its own, with the same methods but `refuse`. It ends with this one, at the latest."""

    def __init__(self, target: str, *, there: Line | None = None, back: Line | None = None, seed: int = 0) -> None:
        command = [sys.executable, "-P", "-m", "marble.testing.relay", target, "--seed", str(seed)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint = str(self._ask({"there": asdict(there or Line()), "back": asdict(back or Line())})["endpoint"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def set(self, *, there: Line | None = None, back: Line | None = None) -> None:
        """As `Relay.set`."""
        self._ask({name: asdict(line) for name, line in (("there", there), ("back", back)) if line is not None})

    def retarget(self, target: str) -> None:
        """As `Relay.retarget`."""
        self._ask({"target": target})

    def reset(self) -> None:
        """As `Relay.reset`."""
        self._ask({"reset": True})

    def counts(self) -> dict[str, int]:
        """As `Relay.counts`."""
        return {name: int(count) for name, count in self._ask({}).items() if name in _COUNTS}

    def stop(self, deadline_s: float = 5.0) -> bool:
        """As `Relay.stop`; a process that does not end by itself is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate(timeout=deadline_s)
            return True
        self._process.kill()
        self._process.communicate()
        return False

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def main(arguments: list[str] | None = None) -> None:
    """Relay until the standard input ends. Each line of it is a JSON object, and is answered.

    Its keys: ``there`` and ``back`` with fields of `Line`, ``target``, ``reset``.
    """
    parser = argparse.ArgumentParser(prog="python -m marble.testing.relay", description=main.__doc__)
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:0")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with Relay(given.target, listen=given.listen, seed=given.seed) as relay:
        for text in sys.stdin:
            request = json.loads(text)
            relay.set(**{name: Line(**request[name]) for name in ("there", "back") if name in request})
            if "target" in request:
                relay.retarget(request["target"])
            if request.get("reset"):
                relay.reset()
            sys.stdout.write(json.dumps({"endpoint": relay.endpoint, **relay.counts()}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
