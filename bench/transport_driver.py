"""The receiving end of `test_transport_processes.py`, in a process of its own; and what the sending end shares with it.

    python transport_driver.py marble|marble-many|flight|flight-checked|socket [kept]

handles memory as ``marble serve`` does if it is told to (`marble.memory`), says its port in one line, then for every line ``bytes
size`` that it reads takes that many bytes in, and answers with one line of JSON: the quantiles of how long messages of `size` bytes
were under way, by the stamp in their first eight bytes, in ms.
What is sent is random. Both ends read the same clock (``CLOCK_MONOTONIC``), which on Linux all processes share.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.flight as fl

from marble._core.checksum import xxh3_64
from marble._core.packing import MESSAGE_SCHEMA
from marble.errors import ProtocolError
from marble.memory import keep_freed_memory
from marble.transport.arrow_flight import create_arrow_flight_transport
from marble.transport.codec import Codec
from marble.transport.messages import MessageCodec

DEADLINE_S: Final = 120.0
END_S: Final = 20.0
"""So long a receiver may take to end. One that still waits for what never comes is killed."""
CHUNK_BYTES: Final = 1 << 20
_STAMP: Final = struct.Struct("<q")


class Sender(Protocol):
    """One way of getting messages into the other process."""

    def send(self, message: bytes) -> None: ...
    def send_many(self, message: bytes, count: int) -> None: ...
    def close(self) -> None: ...


class MarbleSender:
    """`send_message` of marble: a call for each message."""

    def __init__(self, port: int) -> None:
        self._transport = create_arrow_flight_transport("127.0.0.1:0", node_id=1)
        self._transport.start()
        self._transport.connect_to_peer(2, f"127.0.0.1:{port}", timeout_s=DEADLINE_S)

    def send(self, message: bytes) -> None:
        self._transport.send_message(2, message, timeout_s=DEADLINE_S)

    def send_many(self, message: bytes, count: int) -> None:
        send = self._transport.send_message
        for _ in range(count):
            send(2, message, timeout_s=DEADLINE_S)

    def close(self) -> None:
        self._transport.stop()


class MarbleManySender(MarbleSender):
    """`send_messages` of marble: a call for each hundred messages."""

    def send_many(self, message: bytes, count: int) -> None:
        for _ in range(count // 100):
            self._transport.send_messages(2, [message] * 100, timeout_s=DEADLINE_S)
        self._transport.send_messages(2, [message] * (count % 100), timeout_s=DEADLINE_S)


class FlightSender:
    """A bare Flight stream that is given marble's packets, made beforehand: as many messages in each as marble puts there."""

    def __init__(self, port: int) -> None:
        self._client = fl.FlightClient(f"grpc://127.0.0.1:{port}")
        self._writer, self._reader = self._client.do_exchange(fl.FlightDescriptor.for_command(b"x"))
        self._writer.begin(MESSAGE_SCHEMA)
        self._codec = MessageCodec(Codec("c", 1, 1), 1 << 30)

    def send(self, message: bytes) -> None:
        self._write(next(iter(self._codec.encode(2, 0, 0, [message]))))

    def _write(self, packet: Any) -> None:
        self._writer.write_with_metadata(packet.batch, packet.metadata)

    def send_many(self, message: bytes, count: int) -> None:
        together = max(1, min(count, CHUNK_BYTES // len(message)))
        packets = list(self._codec.encode(2, 0, 0, [message] * together))
        for _ in range(count // together):
            for packet in packets:
                self._write(packet)
        for _ in range(count % together):
            self.send(message)

    def close(self) -> None:
        with contextlib.closing(self._client):
            self._writer.done_writing()
            self._writer.close()


class CheckedFlightSender(FlightSender):
    """The same, with what no transport can spare that promises to notice damage: a checksum over the bytes, here and at the other end."""

    def _write(self, packet: Any) -> None:
        digest = xxh3_64(packet.batch.column(0).buffers()[1])
        self._writer.write_with_metadata(packet.batch, digest.to_bytes(8, "little"))


class SocketSender:
    """A TCP connection and ``sendall`` of as many bytes at once."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: bytes) -> None:
        self._socket.sendall(message)

    def send_many(self, message: bytes, count: int) -> None:
        together = max(1, min(count, CHUNK_BYTES // len(message)))
        data = message * together
        for _ in range(count // together):
            self._socket.sendall(data)
        self._socket.sendall(message * (count % together))

    def close(self) -> None:
        self._socket.close()


SENDERS: Final = {
    "marble": MarbleSender,
    "marble-many": MarbleManySender,
    "flight": FlightSender,
    "flight-checked": CheckedFlightSender,
    "socket": SocketSender,
}


class Pair:
    """A sender here and its receiver in another process; `kept`: that one keeps freed memory. A sender frees little, and all the same."""

    def __init__(self, kind: str, kept: bool = False) -> None:
        self.kind = kind
        command = [sys.executable, str(Path(__file__)), kind, *(["kept"] if kept else [])]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._say, self._hear = self._child.stdin, self._child.stdout
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            self.sender: Sender = SENDERS[kind](int(self._hear.readline()))
            self._stack = stack.pop_all()
            self._stack.callback(self.sender.close)

    def _expect(self, nbytes: int, size: int) -> None:
        self._say.write(f"{nbytes} {size}\n")
        self._say.flush()

    def _result(self) -> dict[str, float]:
        found: dict[str, float] = json.loads(self._hear.readline())
        return found

    def sustain(self, size: int, count: int) -> dict[str, float]:
        """Send `count` messages as fast as that goes; returns when all have arrived."""
        self._expect(size * count, 0)
        self.sender.send_many(random.Random(1).randbytes(size), count)
        return self._result()

    def offer(self, size: int, count: int, per_s: float) -> dict[str, float]:
        """Send `count` messages, evenly spread; quantiles of the time from when each was due until it had arrived."""
        self._expect(size * count, size)
        rest = random.Random(1).randbytes(size - _STAMP.size)
        step_ns = round(1e9 / per_s)
        due_ns = time.monotonic_ns()
        for _ in range(count):
            due_ns += step_ns
            while (ahead_ns := due_ns - time.monotonic_ns()) > 0:
                time.sleep(ahead_ns / 1e9)
            self.sender.send(_STAMP.pack(due_ns) + rest)
        return self._result()

    def spent_s(self) -> float:
        """Processor time of both ends so far, in seconds."""
        there = sum(map(int, Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return time.process_time() + there / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End both sides. A stream that broke ends with an error: that is the caller's to see, when nothing of the pair is left."""
        self._stack.close()

    def _end(self) -> None:
        """Wait for the receiver, which ends when it reads no more orders and has what it was ordered to take in; not for ever."""
        with contextlib.suppress(BrokenPipeError):
            self._say.close()
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._hear.close()


# -- the process at the other end -----------------------------------------------------------------------------------------


def marble_messages() -> Iterator[Any]:
    transport = create_arrow_flight_transport("127.0.0.1:0", node_id=2)
    transport.start()
    print(transport.endpoint.rpartition(":")[2], flush=True)
    while True:
        yield from transport.receive_messages()


def flight_messages(checked: bool = False) -> Iterator[Any]:
    got: queue.SimpleQueue[pa.Buffer] = queue.SimpleQueue()

    class Server(fl.FlightServerBase):  # type: ignore[misc]
        def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            for chunk in reader:
                body = chunk.data.column(0).buffers()[1]
                if checked and xxh3_64(body) != int.from_bytes(chunk.app_metadata.to_pybytes(), "little"):
                    raise ProtocolError("damaged")
                got.put(body)

    server = Server("grpc://127.0.0.1:0")
    print(server.port, flush=True)
    while True:
        yield got.get()


def socket_messages() -> Iterator[Any]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while size := connection.recv_into(buffer):
            yield buffer[:size]


def serve(kind: str) -> None:
    messages = {
        "marble": marble_messages,
        "marble-many": marble_messages,
        "flight": flight_messages,
        "flight-checked": partial(flight_messages, True),
        "socket": socket_messages,
    }[kind]()
    # The first message lies ready when the first order is read: a generator says its port on the way to it.
    held: Any = next(messages)
    for order in sys.stdin:
        missing, size = map(int, order.split())
        times, pending = array("q"), bytearray()
        while missing > 0:
            message, held = held if held is not None else next(messages), None
            missing -= len(message)
            if size:
                # A socket hands out what it has, in pieces of any length.
                pending += memoryview(message)
                while len(pending) >= size:
                    times.append(time.monotonic_ns() - _STAMP.unpack_from(pending)[0])
                    del pending[:size]
        spread = sorted(times) or [0]
        found = {f"p{at}": spread[min(len(spread) - 1, len(spread) * at // 100)] / 1e6 for at in (50, 99)}
        print(json.dumps({**found, "max": spread[-1] / 1e6}), flush=True)


if __name__ == "__main__":
    if sys.argv[2:] == ["kept"] and not keep_freed_memory():
        sys.exit("the C library is not glibc, or the environment sets its tunables")
    serve(sys.argv[1])
