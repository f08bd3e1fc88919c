"""The picture of a node and its group that callers get as JSON, taken on the engine thread between two turns.

Rule 1: only what can be read at once: no file, no lock that somebody could hold for long.
Rule 2: keys are added and never change their meaning: other versions, and people's scripts, read them.
"""

from __future__ import annotations

import functools
import importlib.metadata
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from marble.driver import Driver
from marble.machine import HealingMachine
from marble.metrics import Metrics
from marble.options import NodeOptions
from marble.raft.progress import Progress


def status_of(driver: Driver, options: NodeOptions, log_bytes: int, wall_us: int, metrics: Metrics) -> dict[str, Any]:
    """What the node with `driver` knows of itself and of its group.

    Positions are indexes of the log; ``…_us`` are microseconds since 1970: ``wall_us`` by this node's clock, ``entry_time_us``
    the latest that a leader wrote into an entry applied here. Only a leader knows ``peers``.
    """
    raft, machine, members = driver.raft, driver.machine, driver.raft.members
    endpoints, snapshots = driver.endpoints, driver.snapshots
    return {
        **versions(),
        "cluster_id": options.cluster_id,
        "node_id": options.node_id,
        "endpoint": endpoints.get(options.node_id, options.endpoints.get(options.node_id, "")),
        "role": raft.role.value,
        "term": raft.term,
        "leader_id": raft.leader,
        "leader_endpoint": endpoints.get(raft.leader),
        "max_entry_size": options.entry_bytes_max,
        "transferee": raft.transferee,
        "members": list(members.voters),
        "outgoing": list(members.outgoing),
        "learners": list(members.learners),
        "learners_next": list(members.learners_next),
        "joint": members.joint,
        "last_index": raft.last_index,
        "persisted_index": raft.persisted_index,
        "commit_index": raft.commit_index,
        "applied_index": raft.applied_index,
        "snapshot_index": 0 if raft.snapshot is None else raft.snapshot.index,
        "purged_index": raft.log.first_index - 1,
        "quiesced": raft.quiesced,
        "sessions": getattr(machine, "session_count", 0),
        "log_bytes": log_bytes,
        "memory_bytes": getattr(machine, "memory_bytes", 0),
        "backlog_bytes": getattr(machine, "backlog_bytes", 0),
        "damaged_files": len(machine.damaged()) if isinstance(machine, HealingMachine) else 0,
        "scrubbed_files": driver.compactor.scrubbed,
        "stalled": snapshots is not None and snapshots.stalled is not None,
        "wall_us": wall_us,
        "entry_time_us": getattr(machine, "time_us", 0),
        "peers": {str(peer): _progress(progress) for peer, progress in sorted(raft.progress.items())},
        "nodes": {str(node): endpoint for node, endpoint in sorted(endpoints.items())},
        "metrics": metrics.snapshot(),
    }


@functools.cache
def versions() -> MappingProxyType[str, str]:
    """``version`` (of marble) and ``pyarrow_version``. A source tree that was never installed has no version of its own."""
    try:
        own = importlib.metadata.version("marbledb")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return MappingProxyType({"version": own, "pyarrow_version": pa.__version__})


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "match_index": progress.match_index,
        "next_index": progress.next_index,
        "state": progress.state.value,
        "active": progress.recent_active,
        "inflight_messages": progress.inflights.count,
        "inflight_bytes": progress.inflights.bytes,
    }
