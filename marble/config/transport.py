"""The way between the nodes: the table ``[cluster.transport]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from marble.config.values import check_int, shown
from marble.errors import UsageError

_MIB: Final = 2**20

COMPRESSIONS: Final = ("auto", "off", "lz4", "zstd")

PROFILES: Final[Mapping[str, Mapping[str, int]]] = {
    "lan": {
        "connect_timeout_ms": 1_000,
        "silent_peer_ms": 5_000,
        "queue_bytes_max": 64 * _MIB,
        "snapshot_window_bytes_max": 16 * _MIB,
    },
    "wan": {
        # TCP, TLS and HTTP/2 take four round trips before the first byte, on a way that also loses packets.
        "connect_timeout_ms": 5_000,
        "silent_peer_ms": 15_000,
        # 320 MB/s at 200 ms.
        "queue_bytes_max": 128 * _MIB,
        "snapshot_window_bytes_max": 64 * _MIB,
    },
}
"""What a key means that is not given. Neither bounds what can be measured: windows grow and shrink by round trips."""


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """Limits of the way between nodes: the table ``[cluster.transport]``. What is None comes from the profile.

    Invariants: after construction no field is None.

    Parameters
    ----------
    profile
        ``"lan"``, or ``"wan"`` for nodes that are 50 to 200 ms apart. For these also make ``heartbeat_interval_ms`` at least
        300 and ``election_timeout_ms`` at least ten round trips: a node warns when it measures more.
    connect_timeout_ms
        One attempt to reach a peer, at most: most take a quarter of the election timeout; 10 to 60000.
    silent_peer_ms
        A stream is given up on which the peer answers nothing for so long, at most: an election timeout is enough where
        answers come much sooner; 100 to 600000.
    queue_bytes_max
        What may wait for one peer, of each kind of message; 1 MiB to 1 TiB.
    snapshot_window_bytes_max
        What a node asks its peers for ahead while it fetches a snapshot; 64 KiB to 1 GiB.
    compression
        Of large payloads between nodes: ``"auto"`` where it makes them arrive sooner, ``"off"``, ``"lz4"``, ``"zstd"``.

    Raises
    ------
    UsageError
        If a value is of the wrong type or out of bounds.
    """

    profile: str = "lan"
    connect_timeout_ms: int | None = None
    silent_peer_ms: int | None = None
    queue_bytes_max: int | None = None
    snapshot_window_bytes_max: int | None = None
    compression: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.profile, str) or self.profile not in PROFILES:
            known = " or ".join(f'"{name}"' for name in PROFILES)
            raise UsageError(f"[cluster.transport] profile must be {known}, not {shown(self.profile)}")
        if not isinstance(self.compression, str) or self.compression not in COMPRESSIONS:
            raise UsageError(
                f"[cluster.transport] compression must be one of {', '.join(COMPRESSIONS)}, not {shown(self.compression)}"
            )
        for name, value in PROFILES[self.profile].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        where = "[cluster.transport] "
        check_int(f"{where}connect_timeout_ms", self.connect_timeout_ms, 10, 60_000)
        check_int(f"{where}silent_peer_ms", self.silent_peer_ms, 100, 600_000)
        check_int(f"{where}queue_bytes_max", self.queue_bytes_max, _MIB, 2**40)
        check_int(f"{where}snapshot_window_bytes_max", self.snapshot_window_bytes_max, 2**16, 2**30)
