"""A node over time: its status, looked at again and again, turned into rates, latencies and what a screen shows.

Rule 1: pure. Nothing here has a clock, a thread or a socket: whoever looks says when. The web page's history, `marble status
--watch` and the tests use the same lines.
Rule 2: a status may come from another node, perhaps of another version: what is missing in it or of another type counts as zero.

::

    older, newer = take(status_then, 10.0), take(status_now, 11.0)
    moment = between(older, newer)     # rates per second and latencies of that second
    peers(status_now)                  # what its node knows of each of the others
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from marble.errors import UsageError
from marble.metrics import Spread, spread_of

HISTORY_S_MAX: Final = 15 * 60
"""How far back a node remembers, at one moment a second: about 200 KB."""

COUNTERS: Final = {
    "writes": "writes_committed",
    "write_bytes": "write_bytes_committed",
    "reads": "reads_confirmed",
    "messages_sent": "transport_messages_sent",
    "messages_received": "transport_messages_received",
}
"""Rates of a `Moment`, and the counters of `marble.metrics` that they are made of."""

LATENCIES: Final = {
    "write": "write_seconds",
    "commit": "commit_seconds",
    "sync": "log_sync_seconds",
    "apply": "apply_seconds",
}
"""Latencies of a `Moment`, and the histograms that they are made of."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a node had counted at one time. `at` is of a monotonic clock, in seconds."""

    at: float
    status: Mapping[str, Any]
    counts: Mapping[str, float]
    spreads: Mapping[str, Spread]


@dataclass(frozen=True, slots=True)
class Moment:
    """A node between two looks at it.

    Rates are per second and never negative; latencies are in seconds, 0.0 if nothing was measured. ``entries`` are those
    that the group committed and ``applied`` those that this node applied, whoever leads; ``writes`` are this node's own.
    """

    at: float
    """When the later look was, in seconds of the clock that the caller uses."""
    role: str
    term: int
    leader: int
    commit_index: int
    lag: int
    """Entries that are committed and not yet applied here."""
    peer_lag: int
    """At the leader: entries that the slowest peer lacks."""
    entries: float
    applied: float
    writes: float
    write_bytes: float
    reads: float
    messages_sent: float
    messages_received: float
    write_p50: float
    write_p99: float
    commit_p50: float
    commit_p99: float
    sync_p50: float
    sync_p99: float
    apply_p50: float
    apply_p99: float


@dataclass(frozen=True, slots=True)
class Peer:
    """What a node knows of another one. What only a leader knows is None elsewhere."""

    node: int
    endpoint: str
    part: str
    """voter, learner, or what it is about to be."""
    leads: bool
    here: bool
    """Whether this is the node itself that was asked."""
    connected: bool | None
    state: str | None
    match_index: int | None
    lag: int | None
    """Entries of the log that it lacks, as far as the leader knows."""
    inflight_messages: int | None
    inflight_bytes: int | None
    round_trip_s: float | None


def take(status: Mapping[str, Any], at: float) -> Sample:
    """What is needed of `status` (see `Node.status`), looked at at `at`."""
    metrics = _object(status.get("metrics"))
    return Sample(
        at,
        {name: value for name, value in status.items() if name != "metrics"},
        {name: _number(metrics.get(name)) for name in COUNTERS.values()},
        {name: spread_of(metrics.get(name)) for name in LATENCIES.values()},
    )


def between(older: Sample, newer: Sample, at: float | None = None) -> Moment:
    """What happened from `older` to `newer`. `at`: what to call the time, if not `newer.at`.

    A node that was started anew in between has counted less than before: its rates are then zero.
    """
    seconds = newer.at - older.at
    rates = {name: _rate(older.counts[source], newer.counts[source], seconds) for name, source in COUNTERS.items()}
    for name, source in (("entries", "commit_index"), ("applied", "applied_index")):
        rates[name] = _rate(_number(older.status.get(source)), _number(newer.status.get(source)), seconds)
    quantiles: dict[str, float] = {}
    for name, source in LATENCIES.items():
        spread = newer.spreads[source] - older.spreads[source]
        fresh = spread if min(spread.counts) >= 0 else newer.spreads[source]
        quantiles[f"{name}_p50"], quantiles[f"{name}_p99"] = fresh.quantile(0.5), fresh.quantile(0.99)
    status = newer.status
    return Moment(
        at=newer.at if at is None else at,
        role=str(status.get("role", "")),
        term=_whole(status.get("term")),
        leader=_whole(status.get("leader_id")),
        commit_index=_whole(status.get("commit_index")),
        lag=max(0, _whole(status.get("commit_index")) - _whole(status.get("applied_index"))),
        peer_lag=max((peer.lag or 0 for peer in peers(status)), default=0),
        **rates,
        **quantiles,
    )


def peers(status: Mapping[str, Any]) -> list[Peer]:
    """All nodes that `status` speaks of, in the order of their ids, the one that was asked included."""
    here, leader = _whole(status.get("node_id")), _whole(status.get("leader_id"))
    known, links = _object(status.get("peers")), _object(status.get("links"))
    endpoints = _object(status.get("nodes"))
    parts = _parts(status)
    ids = {*parts, *map(_whole, known), *map(_whole, links), here} - {0}
    found = []
    for node in sorted(ids):
        progress, link = _object(known.get(str(node))), _object(links.get(str(node)))
        match = _optional(progress.get("match_index"))
        if node == here and leader == here:
            match = _optional(status.get("persisted_index"))
        found.append(
            Peer(
                node=node,
                endpoint=str(endpoints.get(str(node), "")),
                part=parts.get(node, "not a member"),
                leads=node == leader,
                here=node == here,
                connected=None if node == here or "connected" not in link else bool(link["connected"]),
                state=str(progress["state"]) if "state" in progress and node != here else None,
                match_index=match,
                lag=None if match is None else max(0, _whole(status.get("last_index")) - match),
                inflight_messages=_optional(progress.get("inflight_messages")),
                inflight_bytes=_optional(progress.get("inflight_bytes")),
                round_trip_s=_seconds(link.get("round_trip_s")),
            )
        )
    return found


class History:
    """The last moments of a node, oldest first; not thread-safe.

    - Bounded: at most ``seconds_max`` moments. Looks that come too close together (under half a second) are not kept.
    """

    def __init__(self, seconds_max: int = HISTORY_S_MAX) -> None:
        if seconds_max < 1:
            raise UsageError(f"a history of {seconds_max} s holds nothing")
        self._moments: deque[Moment] = deque(maxlen=seconds_max)
        self._last: Sample | None = None

    @property
    def last(self) -> Sample | None:
        """The latest look that counted."""
        return self._last

    def add(self, sample: Sample, at: float | None = None) -> Moment | None:
        """Look once more; the moment since the last look, if there is one. `at` as in `between`."""
        last = self._last
        if last is not None and sample.at - last.at < 0.5:
            return None
        self._last = sample
        if last is None:
            return None
        moment = between(last, sample, at)
        self._moments.append(moment)
        return moment

    def moments(self, after: float = -math.inf) -> list[Moment]:
        """Those whose time is later than `after`."""
        return [moment for moment in self._moments if moment.at > after]


MOMENT_FIELDS: Final = tuple(field.name for field in fields(Moment))


def columns(moments: Iterable[Moment]) -> dict[str, list[Any]]:
    """`moments` for JSON: one list per field of `Moment`. Numbers are rounded to what a screen can show."""
    rows = [asdict(moment) for moment in moments]
    return {name: [_rounded(row[name]) for row in rows] for name in MOMENT_FIELDS}


def _parts(status: Mapping[str, Any]) -> dict[int, str]:
    lists = (("learners", "learner"), ("learners_next", "to be learner"), ("outgoing", "leaving"), ("members", "voter"))
    parts = {}
    for key, part in lists:
        nodes = status.get(key)
        for node in nodes if isinstance(nodes, list | tuple) else ():
            parts[_whole(node)] = part
    return parts


def _rate(older: float, newer: float, seconds: float) -> float:
    return max(0.0, newer - older) / seconds if seconds > 0 else 0.0


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) and abs(value) < 1e6 else value


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _whole(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    return int(_number(value))


def _optional(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
