"""Users' messages, queued, packed and unpacked. Layout, ownership and invariants: head of ``packing.pyx``."""

from typing import Final, final

import pyarrow as pa
from typing_extensions import Buffer

MESSAGE_SCHEMA: pa.Schema
"""Of a batch of messages: one column ``bytes`` of uint8, without nulls."""

QUEUED: Final = 0
"""It is in the queue."""
WAKE: Final = 1
"""It is in the queue, and whoever waits to take it must be woken."""
FULL: Final = 2
"""There is no room: try again when `Outbox.fed` has returned True to whoever releases."""
CLOSED: Final = 3
"""Nothing is taken now."""

@final
class Outbox:
    """A bounded queue of messages that somebody takes away many at a time. Any thread; never waits.

    Parameters
    ----------
    bytes_max, count_max
        Of all that was put and not yet released. One message alone may be larger.
    """

    def __new__(cls, bytes_max: int, count_max: int) -> Outbox: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def accepting(self) -> bool: ...
    def put(self, data: bytes | pa.Buffer) -> int:
        """Queue `data`, bytes or an immutable buffer; returns QUEUED, WAKE, FULL or CLOSED."""

    def put_many(self, messages: list[bytes | pa.Buffer], first: int) -> tuple[int, bool, bool]:
        """Queue `messages` from the number `first` on until one is refused.

        Returns how many were queued, whether whoever waits to take them must be woken, and whether one was refused.
        """

    def open(self) -> None:
        """Take messages, as it is at first."""

    def close(self) -> None:
        """Take no more."""

    def begin_wait(self) -> bool:
        """Whether there is nothing to take; if so, the next `put` returns WAKE, once."""

    def end_wait(self) -> bool:
        """Give up waiting. False if a `put` or `interrupt` has said meanwhile that this taker must be woken."""

    def interrupt(self) -> bool:
        """Whether somebody waits, who must be woken now, once; if not, the next `begin_wait` returns False."""

    def take(self, bytes_max: int, count_max: int) -> list[bytes | pa.Buffer]:
        """The next messages, at least one if there is any, else within both limits. They count until `release`."""

    def release(self, taken: list[bytes | pa.Buffer]) -> int:
        """Forget what was taken; returns how many bytes that were. Then ask `fed`."""

    def fed(self) -> bool:
        """Whether a `put` has found no room since this was last asked, so that somebody may wait for it."""

    def drain(self) -> list[bytes | pa.Buffer]:
        """Take everything."""

def batch_of_bytes(bytes_: pa.Buffer) -> pa.RecordBatch:
    """A batch of `MESSAGE_SCHEMA` with these bytes, not copied."""

def bytes_of_batch(batch: pa.RecordBatch) -> pa.Buffer:
    """The bytes of a batch of which nothing was checked before, not copied.

    Raises
    ------
    ProtocolError
        It is not of `MESSAGE_SCHEMA`, or lacks some of its bytes.
    """

def pack(items: list[bytes | pa.Buffer], out: Buffer) -> bytes:
    """Copy `items` into `out`, which they fill exactly; return their lengths as uint32."""

@final
class ReceivedMessage:
    """One message of a peer. Immutable; offers the buffer protocol, and ``bytes(message)`` copies.

    It shares the memory of the packet that it came in, at most a few MiB: copy what you keep for long.
    """

    @property
    def sender(self) -> int:
        """The node that sent it."""

    @property
    def data(self) -> memoryview:
        """Its bytes, not copied."""

    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def unpack(run: Buffer, lengths: Buffer, sender: int, skip: int = 0) -> list[ReceivedMessage]:
    """The messages of a packed run but the first `skip`, sharing its memory.

    Raises
    ------
    ProtocolError
        The lengths do not add up to the bytes of `run`.
    """
