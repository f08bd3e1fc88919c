"""What ``marble doctor`` makes of what nodes say of themselves and of each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from marble.doctor.cluster import Visit, check_cluster, check_identity, check_node
from marble.doctor.findings import Finding, Level, Notes


def node(number: int, **more: Any) -> Visit:
    status = {
        "cluster_id": "c",
        "node_id": number,
        "role": "leader" if number == 1 else "follower",
        "term": 4,
        "leader_id": 1,
        "members": [1, 2, 3],
        "outgoing": [],
        "last_index": 50_000,
        "commit_index": 50_000,
        "applied_index": 50_000,
        "nodes": {"1": "a:1", "2": "b:1", "3": "c:1"},
        "version": "1.0",
    }
    return Visit(f"{'abc'[number - 1]}:1", status | more, 1_000_000_000, 1_000_500_000)


def well(visit: Visit, *but: str) -> Visit:
    """`visit` of a node that finds itself well, `but` for these components."""
    names = ("engine", "leader", "disk", "transport", "transport/1", "transport/3")
    health = {"components": {name: {"healthy": name not in but, "detail": f"{name} seen"} for name in names}}
    return dataclasses.replace(visit, health=health)


def told(findings: list[Finding]) -> list[tuple[str, Level]]:
    return [(finding.check, finding.level) for finding in findings if finding.level is not Level.GOOD]


ACTIVE = {"match_index": 50_000, "state": "replicate", "active": True}


@pytest.mark.parametrize(
    ("visits", "expected", "words"),
    [
        ([node(1), node(2), node(3)], [], "node 1 leads"),
        (
            [node(1), node(2)],
            [("quorum", Level.WARNING)],
            "node 3 of 3 voters did not answer here: the cluster can lose 0",
        ),
        ([node(1), node(2), node(3, version="2.0")], [("version", Level.WARNING)], "1.0 at node 1, 2; 2.0 at node 3"),
        ([node(1), node(2, cluster_id="d")], [("cluster", Level.PROBLEM)], "2 clusters: 'c', 'd'"),
        (
            [node(each, leader_id=0, role="follower") for each in (1, 2, 3)],
            [("leader", Level.PROBLEM)],
            "although 3 of 3 voters answer",
        ),
        ([node(4 - 1, leader_id=0, members=[])], [("leader", Level.PROBLEM)], "has not been added"),
        ([node(2), node(3)], [("leader", Level.WARNING), ("quorum", Level.WARNING)], "node 1 is said to lead"),
        ([node(1), node(2), node(3, leader_id=2)], [("leader", Level.NOTE)], "different leaders (nodes 1, 2)"),
        (
            [node(1, peers={"2": ACTIVE, "3": ACTIVE | {"active": False}}), node(2), node(3)],
            [("links", Level.PROBLEM)],
            "node 1 has no connection to node 3 at c:1",
        ),
        (
            [node(1), well(node(2), "transport", "transport/3"), well(node(3), "disk")],
            [("links", Level.PROBLEM)],
            "node 2 has no connection to node 3 at c:1",
        ),
        (
            [node(1, peers={"2": ACTIVE | {"match_index": 7}, "3": ACTIVE | {"state": "snapshot"}}), node(2), node(3)],
            [("lag", Level.WARNING), ("lag", Level.NOTE)],
            "node 2 lacks 49,993 entries",
        ),
    ],
)
def test_what_nodes_say_of_each_other(visits: list[Visit], expected: list[tuple[str, Level]], words: str) -> None:
    findings = check_cluster(visits)
    assert told(findings) == expected
    assert any(words in finding.words for finding in findings)
    assert all(bool(finding.advice) == (finding.level in (Level.WARNING, Level.PROBLEM)) for finding in findings)


@pytest.mark.parametrize(
    ("more", "expected", "words"),
    [
        ({"wall_us": 1_000_200_000}, [], ""),
        ({"wall_us": 999_500_000}, [], ""),
        ({"wall_us": 990_000_000}, [("clock", Level.WARNING)], "10.0 s behind"),
        ({"wall_us": 1_004_500_000}, [("clock", Level.WARNING)], "4.0 s ahead of"),
    ],
)
def test_a_clock_that_differs(more: dict[str, Any], expected: list[tuple[str, Level]], words: str) -> None:
    notes = Notes("a:1")
    check_node(notes, node(1, **more))
    assert told(notes.findings) == expected
    assert words in "".join(finding.words for finding in notes.findings)


def test_another_node_than_the_expected_one() -> None:
    notes = Notes("b:1")
    check_identity(notes, node(2), None, 3)
    assert told(notes.findings) == [("identity", Level.PROBLEM)]


def test_components_that_a_node_finds_wanting() -> None:
    notes = Notes("a:1")
    # What needs the others' word to be judged is left to `check_cluster`.
    check_node(notes, well(node(1), "disk", "leader", "transport", "transport/3"))
    (found,) = notes.findings
    assert (found.check, found.level, found.words) == ("health-disk", Level.PROBLEM, "disk: disk seen")
    assert "make room" in found.advice


@pytest.mark.parametrize("health", [{}, {"components": 7}, {"components": {"disk": None, "log": {"healthy": "no"}}}])
def test_health_in_a_form_that_is_not_known_is_not_judged(health: dict[str, Any]) -> None:
    notes = Notes("a:1")
    visit = dataclasses.replace(node(1), health=health)
    check_node(notes, visit)
    assert notes.findings == []
    assert told(check_cluster([visit, node(2), node(3)])) == []
