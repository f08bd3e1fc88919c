"""Compressing what a stream carries, where that makes it arrive sooner; and unpacking it within limits.

Rule 1: nothing is unpacked before its declared size was found to be within the limit; and never into more than that.
Rule 2: on a link that takes bytes faster than they could be compressed, nothing is done at all, not even to find that out.

Whether it pays is measured: how fast the stream takes bytes, how fast a codec is here and what it leaves of these payloads. So on
loopback and fast networks nothing is compressed, and over a slow link only what shrinks.

Invariants:
- A `Squeezer` belongs to one stream's thread.
- The checksum of what is compressed is that of the bytes before: it covers the compression, too.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

import pyarrow as pa

from marble._core import entry_batch
from marble._core.entry_batch import ENTRY_SCHEMA
from marble.env import Clock
from marble.errors import ProtocolError
from marble.metrics import Metrics
from marble.transport.codec import PROTOCOL_VERSION, Packet


class Compression(enum.IntEnum):
    """How a payload is compressed. The numbers are on the wire: never reuse one."""

    NONE = 0
    LZ4 = 1
    """A raw LZ4 block."""
    ZSTD = 2


FEATURES: Final = {Compression.LZ4: 1, Compression.ZSTD: 2}
"""The bit of a hello by which a node says that it can unpack this."""

ALL_FEATURES: Final = sum(FEATURES.values())

_HEADER: Final = struct.Struct("<4sHHQII")
"""magic, version, codec; bytes when unpacked, bytes of the packet's metadata, zero. Metadata and compressed batch follow."""
_MAGIC: Final = b"MBLZ"
_FRAME_BYTES_MAX: Final = 64 << 10
"""What a batch of entries takes as an Arrow message beside its buffers, generously."""
_CODECS: Final = {Compression.LZ4: pa.Codec("lz4_raw"), Compression.ZSTD: pa.Codec("zstd", compression_level=1)}
_BYTES_MIN: Final = 16 << 10
"""Smaller payloads are not worth the thought."""
_SAMPLE_BYTES: Final = 64 << 10
_WINDOW_BYTES: Final = 1 << 20
"""So much must have been written before its speed is believed."""
_GAIN: Final = 0.9
"""It must save a tenth of the time: less is within what the measurements err."""
_PAUSE_MAX: Final = 64
"""After a payload that did not pay, up to so many are sent as they are before the next try."""


class Squeezer:
    """Decides for each payload of one stream whether to compress it, and how.

    Parameters
    ----------
    mode
        ``auto``: what makes it arrive soonest; ``off``; ``lz4`` or ``zstd``: that one, if the peer can unpack it and it shrinks.
    clock
        What measures the codecs.
    metrics
        Where it is counted what was compressed, and to how much.
    """

    def __init__(self, mode: str, clock: Clock, metrics: Metrics) -> None:
        self._mode = mode
        self._clock = clock
        self._seconds_per_byte = 0.0
        self._window_bytes = 0
        self._window_s = 0.0
        self._saved = 0
        self._known: dict[Compression, tuple[float, float]] = {}
        """Of each codec: what part it leaves of a payload, and how many seconds a byte of it takes."""
        self._pause = 0
        self._skip = 0
        self._before = metrics.counter("transport_bytes_before_compression")
        self._after = metrics.counter("transport_bytes_after_compression")

    def wrote(self, nbytes: int, seconds: float) -> None:
        """The stream took in `seconds` what was `nbytes` before any of it was squeezed since the last time.

        While nothing holds it back it takes bytes into memory, at once.
        """
        self._window_bytes += max(0, nbytes - self._saved)
        self._window_s += seconds
        self._saved = 0
        if self._window_bytes >= _WINDOW_BYTES:
            latest = self._window_s / self._window_bytes
            self._seconds_per_byte = (self._seconds_per_byte + latest) / 2 if self._seconds_per_byte else latest
            self._window_bytes, self._window_s = 0, 0.0

    def wants(self, nbytes: int, features: int) -> bool:
        """Whether a payload of `nbytes` is worth a look."""
        if self._mode == "off" or nbytes < _BYTES_MIN or not features:
            return False
        return self._mode != "auto" or self._seconds_per_byte >= _fastest(Compression.LZ4)

    def squeeze(self, body: pa.Buffer, features: int) -> tuple[Compression, pa.Buffer]:
        """`body` as it is to be sent to a peer with these `features`."""
        if not self.wants(body.size, features):
            return Compression.NONE, body
        if self._skip:
            self._skip -= 1
            return Compression.NONE, body
        choice = self._choose(body, features)
        if choice is not Compression.NONE:
            squeezed = self._try(choice, body)
            if squeezed.size < _GAIN * body.size:
                self._pause = 0
                self._before.add(body.size)
                self._after.add(squeezed.size)
                self._saved += body.size - squeezed.size
                return choice, squeezed
        # What would have been lost on a payload that does not shrink is not lost on each that follows.
        self._pause = min(max(1, 2 * self._pause), _PAUSE_MAX)
        self._skip = self._pause
        self._known.clear()
        return Compression.NONE, body

    def _choose(self, body: pa.Buffer, features: int) -> Compression:
        able = [codec for codec, bit in FEATURES.items() if features & bit]
        if self._mode != "auto":
            return next((codec for codec in able if codec.name.lower() == self._mode), Compression.NONE)
        plain = self._seconds_per_byte
        best, least = Compression.NONE, _GAIN * plain
        for codec in able:
            if codec not in self._known:
                if plain < _fastest(codec):
                    continue
                self._try(codec, body.slice(0, min(body.size, _SAMPLE_BYTES)))
            left, cost = self._known[codec]
            if left * plain + cost < least:
                best, least = codec, left * plain + cost
        return best

    def _try(self, codec: Compression, data: pa.Buffer) -> pa.Buffer:
        began = self._clock.monotonic()
        squeezed = _CODECS[codec].compress(data)
        cost = (self._clock.monotonic() - began) / data.size
        left = squeezed.size / data.size
        known = self._known.get(codec, (left, cost))
        self._known[codec] = (known[0] + left) / 2, (known[1] + cost) / 2
        return squeezed


def _fastest(codec: Compression) -> float:
    """Seconds a byte that compressing takes at the very best: a stream that is faster is not worth a look at the payload."""
    return 1e-9 if codec is Compression.LZ4 else 4e-9


def unsqueeze(number: int, squeezed: pa.Buffer | memoryview | bytes, size: int, size_max: int) -> pa.Buffer:
    """The `size` bytes that were compressed to `squeezed` by the codec with this `number`.

    Raises
    ------
    ProtocolError
        There is no such codec, `size` exceeds `size_max` (found before anything is unpacked), or it is not what it should be.
    """
    if not 0 < size <= size_max:
        raise ProtocolError(f"a payload unpacks to {size} bytes, {size_max} are the most")
    try:
        codec = _CODECS[Compression(number)]
    except (ValueError, KeyError):
        raise ProtocolError(f"a payload is compressed in an unknown way, {number}") from None
    try:
        return codec.decompress(squeezed, decompressed_size=size)
    except (OSError, pa.ArrowException) as error:
        raise ProtocolError(f"a compressed payload is damaged: {error}") from None


def wrap(packet: Packet, squeezer: Squeezer, features: int) -> Packet:
    """A packet of entries as it is to be sent: with its batch, or with that compressed behind its metadata."""
    if packet.batch is None or not squeezer.wants(_BYTES_MIN, features) or packet.batch.nbytes < _BYTES_MIN:
        return packet
    body = entry_batch.encode_payload(packet.batch)
    codec, squeezed = squeezer.squeeze(body, features)
    if codec is Compression.NONE:
        return packet
    head = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, codec, body.size, len(packet.metadata), 0)
    return Packet(b"".join((head, packet.metadata, memoryview(squeezed))), None)


def unwrap(metadata: bytes, batch: pa.RecordBatch | None, entry_bytes_max: int) -> Packet:
    """The packet of entries that came, unpacked if it was compressed. Raises ProtocolError as `unsqueeze`."""
    if not metadata.startswith(_MAGIC):
        return Packet(metadata, batch)
    if len(metadata) < _HEADER.size or batch is not None:
        raise ProtocolError("not a compressed packet")
    _, version, codec, size, head_size, zero = _HEADER.unpack_from(metadata)
    end = _HEADER.size + head_size
    if version != PROTOCOL_VERSION or zero != 0 or end > len(metadata):
        raise ProtocolError("not a compressed packet of this protocol")
    body = unsqueeze(codec, memoryview(metadata)[end:], size, entry_bytes_max + _FRAME_BYTES_MAX)
    return Packet(metadata[_HEADER.size : end], entry_batch.decode_payload(body, ENTRY_SCHEMA))
