"""What a parser is, to those who attack it: valid bytes to start from, a way in, and the errors that it may answer with.

Rule 1: a parser of strange bytes succeeds or raises one of the errors that it promises. Any other exception is a finding, and so is
        memory out of proportion; a crash or a hang ends the process, which nobody can overlook.
Rule 2: targets know no test framework, so that Hypothesis and atheris come in by the same door (`Target.attack`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from marble.errors import MarbleError

MEMORY_BYTES_MAX = 256 * 1024 * 1024
"""What one attack may take beside what this process has before it. Inputs have 64 KiB."""


class Finding(Exception):
    """A parser broke its promise."""


def nothing_to_mend(data: bytes) -> bytes:
    """For what has no checksum."""
    return data


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes
    ----------
    name
        What tests and commands call it.
    seeds
        Makes valid inputs; made once, at first use.
    parse
        Takes any bytes. Checks, too, that what it was given is used as it must be.
    allowed
        What it may raise.
    mend
        Makes checksums and lengths of an input right again as far as it can, so that what is behind them is reached.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    parse: Callable[[bytes], object]
    allowed: tuple[type[MarbleError], ...]
    mend: Callable[[bytes], bytes] = nothing_to_mend

    def attack(self, data: bytes) -> bool:
        """Whether the parser took `data`.

        Raises
        ------
        Finding
            It did anything else than to take it or to refuse it as it promised.
        """
        before = _begin_peak()
        try:
            self.parse(data)
        except self.allowed as error:
            if not str(error).isprintable() and not str(error).replace("\n", "").isprintable():
                raise Finding(f"{self.name}: a message that no terminal should see: {str(error)!a}") from error
            return False
        except Exception as error:
            raise Finding(f"{self.name}: {type(error).__name__}: {error}") from error
        finally:
            grown = _peak() - before
            if grown > MEMORY_BYTES_MAX:
                raise Finding(f"{self.name}: {len(data)} bytes took {grown} bytes of memory")
        return True


def _begin_peak() -> int:
    """What this process has in memory, which from now on is also the most that it had."""
    Path("/proc/self/clear_refs").write_bytes(b"5")
    return _peak()


def _peak() -> int:
    found = re.search(rb"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_bytes())
    return 0 if found is None else int(found[1]) * 1024


def join(*parts: bytes) -> bytes:
    """Several inputs in one: each with its length before it."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def split(data: bytes, count: int) -> list[bytes]:
    """The inverse of `join` for anything: exactly `count` parts, the last of which takes what is left."""
    parts = []
    for number in range(count):
        (size,) = struct.unpack_from("<I", data.ljust(4, b"\0"))
        end = len(data) if number == count - 1 else min(len(data), 4 + size)
        parts.append(data[4:end])
        data = data[end:]
    return parts


def aligned(data: bytes) -> pa.Buffer:
    """A copy of `data` as the log and the wire give it: at a multiple of 64 bytes, filled up to one."""
    buffer = pa.allocate_buffer(-(-max(len(data), 1) // 64) * 64)
    memoryview(buffer).cast("B")[:] = data.ljust(buffer.size, b"\0")
    return buffer


def batch_of(data: bytes) -> pa.RecordBatch | None:
    """The first batch of an IPC stream, unchecked, as Flight delivers it; None if there is none."""
    try:
        with pa.ipc.open_stream(data) as reader:
            return reader.read_next_batch()
    except (pa.ArrowException, OSError, StopIteration, UnicodeDecodeError):
        return None


def stream_of(batch: pa.RecordBatch) -> bytes:
    """`batch` as an IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
