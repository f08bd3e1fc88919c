"""The limits of a transport, all in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from marble.errors import UsageError

COMPRESSIONS: Final = ("auto", "off", "lz4", "zstd")


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """Limits of a transport.

    - ``entry_bytes_max``: buffers of the entries in one packet; above the largest append that a node makes.
    - ``queue_bytes_max``, ``queue_messages_max``: per peer and lane. A queue that is empty takes any one send.
    - ``connect_timeout_s``: one attempt to reach a peer; also how long `Link.join` may have to wait for one. Most attempts take
      ``connect_quick_s`` at most, so that a peer that is back is soon found; see `marble.transport.pump.PATIENT_EVERY`.
    - ``backoff_min_s``, ``backoff_max_s``: pause between attempts, doubling, of which a random half is taken off.
    - ``idle_check_s``: after this long without a message an empty packet shows whether the stream still lives.
    - ``compression``: of large payloads: ``auto`` where it makes them arrive sooner, ``off``, ``lz4``, ``zstd``.
    - ``idle_close_s``: after this long without a message a stream for anything but control is closed until it is needed.
    - ``silent_peer_s``: a stream is broken off on which the peer's process answers nothing for so long; after ``silent_quick_s``, if
      its answers usually come much sooner.
    - ``message_bytes_max``: one message of a user's, whole.
    - ``message_count_max``: users' messages queued for one peer; ``queue_bytes_max`` bounds their bytes.
    - ``mailbox_bytes_max``, ``mailbox_count_max``: users' messages that have come and were not taken out, from all peers.
    - ``ping_s``, ``answer_s``: of several ways to a peer each is asked so often whether it lives, and not used while an answer
      takes longer than ``answer_s`` and longer than is usual there. Together below the interval of heartbeats.
    - ``round_trip_max_s``: a round trip that usually takes longer is logged, once: the election timeout does not fit it.
    - ``calls_max``: calls of clients served at once; the next one is refused.
    - ``strangers_max``: streams that have not yet said who they are; the next one is refused.
    - ``slow_reader_s``: a client that has not read for so long, while a write waits for it, is dropped with its connection.
    """

    entry_bytes_max: int = 256 << 20
    queue_bytes_max: int = 64 << 20
    queue_messages_max: int = 4096
    connect_timeout_s: float = 1.0
    connect_quick_s: float = 0.5
    backoff_min_s: float = 0.02
    backoff_max_s: float = 1.0
    idle_check_s: float = 1.0
    idle_close_s: float = 60.0
    silent_peer_s: float = 5.0
    silent_quick_s: float = 2.0
    message_bytes_max: int = 128 << 20
    message_count_max: int = 65536
    mailbox_bytes_max: int = 64 << 20
    mailbox_count_max: int = 65536
    ping_s: float = 0.05
    answer_s: float = 0.1
    round_trip_max_s: float = 60.0
    calls_max: int = 1024
    strangers_max: int = 64
    compression: str = "auto"
    slow_reader_s: float = 120.0

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise UsageError(f"compression must be one of {', '.join(COMPRESSIONS)}, not {self.compression!r}")
        for name in self.__slots__:
            if name != "compression" and getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0, it is {getattr(self, name)}")
        if self.backoff_min_s > self.backoff_max_s:
            raise UsageError("backoff_min_s must not be above backoff_max_s")
