"""Whether a node is well: decided here, from a picture of it, and nowhere else.

Rule 1: pure. What was seen comes in as an `Observation`; what is asked again with the same one is answered alike.
Rule 2: every limit is a field of `Limits`. A detail says what was seen, what the limit is, and what follows from it.

Three questions, three answers:

- ``live``: does this process still work? If not, only a new start helps. A node without a leader is live: starting it anew
  would change nothing.
- ``ready``: can it serve clients now?
- the components say what is wrong, also where both others hold: a lagging peer is no reason to stop using its leader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from marble.sampling import Peer, peers

MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond which a component is not well. Seconds, bytes, or a share of 1."""

    engine_silent_s: float = 5.0
    """The engine turns many times a second. Above the pause of a busy machine, below the patience of who supervises it."""
    log_sync_s: float = 5.0
    """One sync of the log: a slow disk takes a tenth of it."""
    apply_job_s: float = 30.0
    """One run of entries on their way into the tables."""
    apply_lag_s: float = 5.0
    """What was committed so long ago must be applied."""
    peer_lag_s: float = 10.0
    """What the leader had written so long ago a peer must have."""
    disk_free_bytes: int = 256 * MIB
    """Two snapshots of moderate tables and some log. With less, the next ones may fail."""
    disk_free_share: float = 0.05
    """Of a small file system this share is enough, if it is less than that."""
    backlog_bytes: int = 768 * MIB
    """Of compaction. At 1 GiB writes are refused (`NodeOptions.backlog_bytes_max`)."""
    clock_skew_s: float = 5.0
    """Sessions live by the leader's clock for an hour; a clock that is off by seconds is a clock that nobody keeps."""


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of the data directory."""

    free_bytes: int
    size_bytes: int
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of a node at one time."""

    running: bool = True
    failure: str | None = None
    """What made the engine give up."""
    silent_s: float = 0.0
    """For how long the engine has owed an answer."""
    working: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each thread has been at its present job."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """The engine's latest answer (see `marble.status`), with ``links``; empty if there was none yet."""
    committed_before: int = 0
    """The commit index that the node knew ``Limits.apply_lag_s`` ago."""
    written_before: int = 0
    """The end of its log ``Limits.peer_lag_s`` ago, if it led then, else 0."""
    disk: Disk | None = None
    """None: it could not be looked at."""
    clock_skew_s: float = 0.0
    """By how much the clock of the latest entry is ahead of the node's own."""
    alone: bool = False
    """The node has no peers to talk to, whatever comes."""


@dataclass(frozen=True, slots=True)
class Check:
    """The state of one component."""

    healthy: bool
    detail: str
    live: bool = False
    """Whether the process is of no use without it."""
    ready: bool = False
    """Whether clients cannot be served without it."""


def examine(seen: Observation, limits: Limits | None = None) -> dict[str, Check]:
    """How each component is, by its name, the most important first. Peers are named ``transport/2``."""
    limits = limits or Limits()
    checks = {"engine": _engine(seen, limits)}
    if not checks["engine"].healthy or not seen.status:
        # What was known of the others is old, and nothing of it would be done anyway.
        why = "not known: the engine has not answered yet"
        for name, ready in (("leader", True), ("log", True), ("apply", True), ("membership", True)):
            checks[name] = Check(False, why, ready=ready)
        checks["log"] = _log(seen, limits) if seen.working else checks["log"]
        checks["disk"] = _disk(seen, limits)
        return checks
    checks["leader"] = _leader(seen)
    checks["membership"] = _membership(seen)
    checks["log"] = _log(seen, limits)
    checks["apply"] = _apply(seen, limits)
    checks["storage"] = _storage(seen, limits)
    checks["disk"] = _disk(seen, limits)
    if not seen.alone:
        checks["replication"] = _replication(seen, limits)
        checks |= _transport(seen)
    checks["clock"] = _clock(seen, limits)
    return checks


def is_live(checks: Mapping[str, Check]) -> bool:
    """Whether the process works."""
    return all(check.healthy for check in checks.values() if check.live)


def is_ready(checks: Mapping[str, Check]) -> bool:
    """Whether clients can be served."""
    return all(check.healthy for check in checks.values() if check.live or check.ready)


def as_json(checks: Mapping[str, Check]) -> dict[str, Any]:
    """`checks` as an object of JSON: what `/healthz`, `/readyz` and the Flight action ``health`` answer."""
    return {
        "live": is_live(checks),
        "ready": is_ready(checks),
        "healthy": all(check.healthy for check in checks.values()),
        "components": {name: {"healthy": check.healthy, "detail": check.detail} for name, check in checks.items()},
    }


def _engine(seen: Observation, limits: Limits) -> Check:
    if seen.failure is not None:
        return Check(False, f"stopped by itself: {seen.failure}", live=True)
    if not seen.running:
        return Check(False, "does not run", live=True)
    if seen.silent_s > limits.engine_silent_s:
        busy = [f"{name} for {for_s:.0f} s" for name, for_s in seen.working.items() if for_s > 1.0]
        at = f"; at work: {', '.join(busy)}" if busy else ""
        return Check(
            False, f"has not answered for {seen.silent_s:.0f} s (limit {limits.engine_silent_s:g} s){at}", live=True
        )
    return Check(True, "turns", live=True)


def _leader(seen: Observation) -> Check:
    leader, here = seen.status.get("leader_id", 0), seen.status.get("node_id")
    if not leader:
        return Check(False, "no leader is known: nothing can be written, and read only locally", ready=True)
    who = "this node" if leader == here else f"node {leader}"
    return Check(True, f"{who} leads in term {seen.status.get('term', 0)}", ready=True)


def _membership(seen: Observation) -> Check:
    status, here = seen.status, seen.status.get("node_id")
    if here in [*status.get("members", ()), *status.get("outgoing", ())]:
        return Check(True, "votes", ready=True)
    if here in [*status.get("learners", ()), *status.get("learners_next", ())]:
        return Check(True, "learns, without a vote", ready=True)
    return Check(False, f"is not a member: marble members URL --learner {here}=host:port adds it", ready=True)


def _log(seen: Observation, limits: Limits) -> Check:
    busy_s = seen.working.get("log", 0.0)
    if busy_s > limits.log_sync_s:
        return Check(
            False,
            f"a sync has taken {busy_s:.0f} s so far (limit {limits.log_sync_s:g} s): look at the disk",
            ready=True,
        )
    return Check(True, f"{seen.status.get('log_bytes', 0):,} bytes", ready=True)


def _apply(seen: Observation, limits: Limits) -> Check:
    busy_s, applied = seen.working.get("apply", 0.0), seen.status.get("applied_index", 0)
    if busy_s > limits.apply_job_s:
        return Check(False, f"one run of entries has taken {busy_s:.0f} s (limit {limits.apply_job_s:g} s)", ready=True)
    if applied < seen.committed_before:
        lag = seen.committed_before - applied
        return Check(
            False, f"{lag:,} entries that were committed {limits.apply_lag_s:g} s ago are not applied", ready=True
        )
    return Check(True, f"up to entry {applied:,}", ready=True)


def _storage(seen: Observation, limits: Limits) -> Check:
    damaged = seen.status.get("damaged_files", 0)
    if damaged:
        return Check(
            False, f"{damaged} files of tables are damaged: reads that need them fail until they are fetched anew"
        )
    backlog = seen.status.get("backlog_bytes", 0)
    if backlog > limits.backlog_bytes:
        return Check(
            False, f"{backlog:,} bytes wait for compaction (limit {limits.backlog_bytes:,}): writes will be refused"
        )
    return Check(True, f"{seen.status.get('memory_bytes', 0):,} bytes in memory, {backlog:,} to be compacted")


def _disk(seen: Observation, limits: Limits) -> Check:
    if seen.disk is None:
        return Check(False, "the data directory cannot be looked at", ready=True)
    free, size = seen.disk.free_bytes, seen.disk.size_bytes
    if seen.disk.read_only:
        return Check(False, "the file system is read-only", ready=True)
    least = min(limits.disk_free_bytes, int(size * limits.disk_free_share))
    if free < least:
        return Check(False, f"{free:,} of {size:,} bytes are free (limit {least:,}): make room", ready=True)
    return Check(True, f"{free:,} of {size:,} bytes are free", ready=True)


def _replication(seen: Observation, limits: Limits) -> Check:
    if seen.status.get("role") != "leader":
        return Check(True, "for the leader to say")
    slow = [
        f"node {peer.node} by {peer.lag:,} entries"
        + (" (a snapshot is on its way)" if peer.state == "snapshot" else "")
        for peer in _others(seen)
        if peer.match_index is not None and peer.lag is not None and peer.match_index < seen.written_before
    ]
    if slow:
        return Check(False, f"behind for more than {limits.peer_lag_s:g} s: {', '.join(slow)}")
    return Check(True, "all peers keep up")


def _transport(seen: Observation) -> dict[str, Check]:
    """One for all peers together, and one for each."""
    others = _others(seen)
    known = [peer for peer in others if peer.connected is not None]
    away = [peer for peer in known if not peer.connected]
    checks = {}
    names = ", ".join(f"node {peer.node}" for peer in away)
    checks["transport"] = Check(not away, f"no connection to {names}" if away else f"{len(known)} peers connected")
    for peer in known:
        where = f" at {peer.endpoint}" if peer.endpoint else ""
        checks[f"transport/{peer.node}"] = Check(
            bool(peer.connected), f"node {peer.node}{where} is {'connected' if peer.connected else 'not reached'}"
        )
    return checks


def _clock(seen: Observation, limits: Limits) -> Check:
    if seen.clock_skew_s > limits.clock_skew_s:
        return Check(
            False,
            f"this clock is {seen.clock_skew_s:.1f} s behind that of an entry (limit {limits.clock_skew_s:g} s): use NTP",
        )
    return Check(True, "not behind the entries")


def _others(seen: Observation) -> list[Peer]:
    return [peer for peer in peers(seen.status) if not peer.here]
