"""What the nodes of a cluster say of themselves and of each other, compared.

Rule 1: pure. Who asked the nodes, and when, is in the `Visit`.
Rule 2: a node may be of another version: what its status lacks, or holds in another form, is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from marble.doctor.findings import Finding, Notes

SKEW_S_MAX: Final = 1.0
"""Clocks that differ by more make log lines of nodes hard to compare, and times to live and certificates end early or late."""

LAG_ENTRIES_MAX: Final = 10_000
"""A peer that lacks more entries is catching up, or cannot keep up."""


_ADVICE: Final = {
    "engine": "look in its log for why; `py-spy dump --pid` on that machine shows what hangs; start it anew",
    "log": "look at the disk: iostat, dmesg. The others go on without this node",
    "apply": "if it does not catch up by itself: look at its disk and at what else runs on that machine",
    "storage": "write less for a while, or give it a faster disk; damaged files are fetched anew from the others: test the disk",
    "disk": "make room or enlarge the volume: a node whose log cannot be written stops",
    "replication": "it catches up by itself if the numbers fall; else the peer's disk or network is slower than what is written",
    "clock": "run an NTP client (chrony, systemd-timesyncd) on all nodes",
}
"""What to do about a component that a node itself finds wanting (`marble.web.health`)."""

_COMPARED: Final = ("leader", "membership")
"""Components that are judged from what all nodes say together."""


@dataclass(frozen=True, slots=True)
class Visit:
    """What came of asking one endpoint for its status.

    - ``status``: None if it could not be asked.
    - ``health``: what it says of its components; None: it does not say.
    - ``asked_us``, ``answered_us``: wall clock of this machine around the question, in microseconds since 1970.
    """

    endpoint: str
    status: Mapping[str, Any] | None = None
    asked_us: int = 0
    answered_us: int = 0
    health: Mapping[str, Any] | None = None


def check_identity(notes: Notes, visit: Visit, cluster_id: str | None, expected: int | None) -> None:
    """Whether the node is of the right cluster, and the one that others expect there."""
    status = visit.status or {}
    found, node = status.get("cluster_id"), status.get("node_id")
    if cluster_id is not None and found != cluster_id:
        notes.problem(
            "cluster",
            f"node {node} belongs to cluster {found!r}, not to {cluster_id!r}",
            "check the address; or [cluster] cluster_id in the node's config, which must be the same at all nodes",
        )
    elif expected is not None and node != expected:
        notes.problem(
            "identity",
            f"node {node} answers here, where the others expect node {expected}",
            "check the addresses in node_endpoints: two nodes have been mixed up",
        )
    else:
        lag = _number(status, "commit_index") - _number(status, "applied_index")
        behind = f", {lag:,.0f} entries behind in applying" if lag > LAG_ENTRIES_MAX else ""
        notes.good(
            "node", f"node {node} of cluster {found!r}: {status.get('role')} in term {status.get('term')}{behind}"
        )


def check_node(notes: Notes, visit: Visit) -> None:
    """What one node says of itself: its clock, and its components."""
    status = visit.status or {}
    wall_us = status.get("wall_us")
    if isinstance(wall_us, int):
        # It was read at some moment between question and answer.
        early, late = (visit.asked_us - wall_us) / 1e6, (wall_us - visit.answered_us) / 1e6
        if max(early, late) > SKEW_S_MAX:
            way = f"{early:.1f} s behind" if early > late else f"{late:.1f} s ahead of"
            notes.warn(
                "clock",
                f"its clock is {way} the one of this machine",
                "run an NTP client (chrony, systemd-timesyncd) on both. Raft does not rest on the wall clock; times to live, "
                "certificates and reading logs side by side do",
            )
    for name, component in _mapping(visit.health or {}, "components").items():
        if not isinstance(component, Mapping) or component.get("healthy") is not False:
            continue
        if name not in _COMPARED and not str(name).startswith("transport"):
            advice = _ADVICE.get(str(name), "look in its log")
            notes.problem(f"health-{name}", f"{name}: {component.get('detail')}", advice)


def check_cluster(visits: Sequence[Visit]) -> list[Finding]:
    """What only shows when the nodes are looked at together."""
    statuses = [visit.status for visit in visits if visit.status is not None]
    notes = Notes("cluster")
    if not statuses:
        return notes.findings
    ids = sorted({str(status.get("cluster_id")) for status in statuses})
    if len(ids) > 1:
        notes.problem(
            "cluster",
            f"the nodes are of {len(ids)} clusters: {', '.join(map(repr, ids))}",
            "ask each cluster by itself; or mend [cluster] cluster_id of those that are wrong",
        )
        return notes.findings
    _check_versions(notes, statuses)
    _check_leader(notes, statuses)
    _check_peers(notes, visits)
    return notes.findings


def _check_versions(notes: Notes, statuses: Sequence[Mapping[str, Any]]) -> None:
    for name, words in (("version", "marble"), ("pyarrow_version", "pyarrow")):
        having: dict[str, list[str]] = {}
        for status in statuses:
            if status.get(name):
                having.setdefault(str(status[name]), []).append(str(status.get("node_id")))
        if len(having) > 1:
            shown = "; ".join(f"{version} at node {', '.join(nodes)}" for version, nodes in sorted(having.items()))
            notes.warn(
                "version",
                f"the nodes run different versions of {words}: {shown}",
                "right in the middle of an upgrade; else finish it, one node after the other",
            )


def _check_leader(notes: Notes, statuses: Sequence[Mapping[str, Any]]) -> None:
    newest = max(statuses, key=lambda status: _number(status, "term"))
    voters = set(_ids(newest, "members")) | set(_ids(newest, "outgoing"))
    up = {int(_number(status, "node_id")) for status in statuses}
    missing = sorted(voters - up)
    majority = len(voters) // 2 + 1
    leaders = {int(_number(status, "leader_id")) for status in statuses if _number(status, "leader_id")}
    if not leaders:
        if not voters:
            advice = "a node that joins waits for it: marble members URL --add ID=HOST:PORT, at the cluster"
            notes.problem("leader", "no node knows a leader, nor members: it has not been added to a cluster", advice)
        elif len(voters & up) < majority:
            notes.problem(
                "leader",
                f"there is no leader, and cannot be: of {len(voters)} voters {len(voters & up)} answer, and {majority} are needed",
                f"bring back {_nodes(missing)}: what is wrong with each is said above",
            )
        else:
            notes.problem(
                "leader",
                f"there is no leader although {len(voters & up)} of {len(voters)} voters answer here",
                "within a few election timeouts there should be: if not, the nodes do not reach each other (look at their "
                "logs for 'lost node'), though this machine reaches them",
            )
        return
    leading = [status for status in statuses if status.get("role") == "leader"]
    if len(leaders) > 1:
        notes.note(
            "leader", f"the nodes name different leaders ({_nodes(sorted(leaders))}): one is being elected just now"
        )
    elif leading:
        notes.good("leader", f"node {leading[0].get('node_id')} leads in term {leading[0].get('term')}")
    else:
        notes.warn(
            "leader",
            f"node {next(iter(leaders))} is said to lead, and could not be asked from here",
            "clients of this machine cannot write either, unless another node forwards it: mend the way to that node",
        )
    if missing and len(voters & up) >= majority:
        spare = len(voters & up) - majority
        notes.warn(
            "quorum",
            f"{_nodes(missing)} of {len(voters)} voters did not answer here: the cluster can lose {spare} more",
            "what is wrong with it is said above",
        )


def _check_peers(notes: Notes, visits: Sequence[Visit]) -> None:
    """Whom the nodes themselves do not reach, whatever this machine sees."""
    up = {int(_number(visit.status, "node_id")) for visit in visits if visit.status is not None}
    silent = {visit.endpoint for visit in visits if visit.status is None}
    for visit in visits:
        status = visit.status or {}
        own, lost = int(_number(status, "node_id")), set()
        for name, component in _mapping(visit.health or {}, "components").items():
            if isinstance(component, Mapping) and component.get("healthy") is False:
                lost.add(_peer(str(name).removeprefix("transport/")))
        if status.get("role") == "leader":
            for name, progress in _mapping(status, "peers").items():
                if _peer(name) != own and isinstance(progress, Mapping):
                    _check_progress(notes, status, _peer(name), progress, lost)
        for peer in sorted(lost - {own, 0}):
            place = _mapping(status, "nodes").get(str(peer), "its endpoint")
            if peer not in up and place in silent:
                continue  # That it answers nobody was said above.
            if peer in up:
                advice = f"from here it answers, so look at the way between the two: can the machine of node {own} reach {place}?"
            else:
                advice = f"ask there, too: marble doctor {place}"
            notes.problem("links", f"node {own} has no connection to node {peer} at {place}", advice)


def _check_progress(
    notes: Notes, status: Mapping[str, Any], peer: int, progress: Mapping[str, Any], lost: set[int]
) -> None:
    if progress.get("active") is False:
        lost.add(peer)
        return
    lag = _number(status, "last_index") - _number(progress, "match_index")
    if progress.get("state") == "snapshot":
        notes.note("lag", f"node {peer} is being sent a snapshot")
    elif lag > LAG_ENTRIES_MAX and peer not in lost:
        notes.warn(
            "lag",
            f"node {peer} lacks {lag:,.0f} entries of the leader's log",
            "it catches up by itself if this number falls; else its disk or network is slower than what is written",
        )


def _nodes(ids: Sequence[int]) -> str:
    return ("node " if len(ids) == 1 else "nodes ") + ", ".join(map(str, ids))


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _ids(status: Mapping[str, Any], name: str) -> list[int]:
    value = status.get(name)
    return [each for each in value if isinstance(each, int)] if isinstance(value, list) else []


def _mapping(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = status.get(name)
    return value if isinstance(value, Mapping) else {}


def _peer(name: object) -> int:
    return int(name) if isinstance(name, str) and name.isascii() and name.isdigit() else 0
