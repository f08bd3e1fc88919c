"""``marble status``: what is said by nodes, as a table, a line, a screen and JSON."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from server.cluster import WAIT_S, Cluster, eventually, rows

from marble.cli import main
from marble.errors import UnavailableError
from marble.watch import (
    DASH,
    HEADER,
    NODES_MAX,
    SPAN_S,
    Board,
    Seen,
    curve,
    line_of,
    milliseconds,
    open_board,
    screen_of,
    size,
    sparkline,
    stretch_s,
    table_of,
)


def picture(number: int, uptime_s: float = 100.0, **node: Any) -> dict[str, Any]:
    """What node `number` of three says, of which node 1 leads."""
    at = [uptime_s - 2.0, uptime_s - 1.0]
    peers = [
        {
            "node": each,
            "endpoint": f"h{each}:1",
            "here": each == number,
            "lag": (each - 1) * 1000 if number == 1 else None,
        }
        for each in (1, 2, 3)
    ]
    return {
        "node": {
            "cluster_id": "c",
            "node_id": number,
            "role": "leader" if number == 1 else "follower",
            "term": 3,
            "leader_id": 1,
            "applied_index": 12_345,
            "log_bytes": 3 << 20,
            "memory_bytes": 512,
        }
        | node,
        "peers": peers,
        "health": {"components": {"disk": {"healthy": number != 3}, "log": {"healthy": True}}},
        "uptime_s": uptime_s,
        "moments": {
            "at": at,
            "entries": [10.0, 20.0],
            "commit_p50": [0.001, 0.002],
            "commit_p99": [0.5, 0.0034],
            "sync_p99": [0.0, 0.0],
        },
    }


class Told:
    """Answers for endpoints; those that it does not have are silent."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = dict(answers)
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, endpoint: str, body: bytes) -> Mapping[str, Any]:
        self.asked.append((endpoint, json.loads(body)))
        if endpoint not in self.answers:
            raise UnavailableError(f"{endpoint}: the connection is refused")
        found: Mapping[str, Any] = self.answers[endpoint]
        return found


def three(*silent: int) -> tuple[Board, Told]:
    told = Told({f"h{number}:1": picture(number) for number in (1, 2, 3) if number not in silent})
    first = next(iter(told.answers), "h1:1")
    return Board([first], told), told


def test_one_node_is_named_and_all_are_shown() -> None:
    board, told = three()
    board.look()
    assert sorted(endpoint for endpoint, _ in told.asked) == ["h1:1", "h2:1", "h3:1"]
    head, blank, header, *lines = table_of(board)
    assert head == "cluster c · node 1 leads in term 3 · 3 of 3 nodes answer"
    assert (blank, header.split("  ")[0]) == ("", "node")
    cells = [re.split(r"\s{2,}", line) for line in lines]
    assert cells == [
        ["1", "h1:1", "leader", "3", "12,345", DASH, "20", DASH, "3.0 MiB", "512 B", "well"],
        ["2", "h2:1", "follower", "3", "12,345", "1,000", "20", DASH, "3.0 MiB", "512 B", "well"],
        ["3", "h3:1", "follower", "3", "12,345", "2,000", "20", DASH, "3.0 MiB", "512 B", "not well: disk"],
    ]
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d · cluster c · .* · 20 entries/s · commit p50/p99 2 ms / 3.4 ms · sync p50/p99 – / – · "
        r"behind: node 2 1,000, node 3 2,000",
        line_of(board),
    )


def test_only_what_is_new_is_asked_for_again() -> None:
    board, told = three()
    board.look()
    told.asked.clear()
    board.look()
    assert {body["after"] for _, body in told.asked} == {99.0}


def test_a_leader_that_falls_silent_is_said_to_be() -> None:
    board, told = three()
    board.look()
    del told.answers["h1:1"]
    board.look()
    assert board.headline() == "cluster c · node 1 is said to lead, and does not answer · 2 of 3 nodes answer"
    # Its number is still known, and its last positions are not passed off as those of now.
    assert re.split(r"\s{2,}", table_of(board)[3])[:4] == ["1", "h1:1", DASH, DASH]
    assert "h1:1: the connection is refused" in table_of(board)[3]
    assert line_of(board).endswith("silent: h1:1")


def test_no_node_and_no_leader() -> None:
    board, told = three(1, 2, 3)
    board.look()
    assert "marble doctor" in board.headline()
    told.answers["h1:1"] = picture(1, role="candidate", leader_id=0)
    board.look()
    assert "no leader" in board.headline()


def test_a_node_that_was_started_anew_begins_its_curves_anew() -> None:
    board, told = three()
    board.look()
    told.answers["h1:1"] = picture(1, uptime_s=5.0)
    board.look()
    assert [moment["at"] for moment in board.nodes["h1:1"].moments] == [3.0, 4.0]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"node": 7, "peers": "x", "health": [], "moments": 3, "uptime_s": "long"},
        {"node": {}, "peers": [1, {}], "health": {"components": {"a": 1}}, "moments": {"at": [1.0], "b": [], "c": 4}},
        {"node": {"role": "leader", "node_id": 1, "term": None, "log_bytes": "many"}, "peers": [{"endpoint": 9}]},
    ],
)
def test_answers_in_another_form_break_nothing(answer: dict[str, Any]) -> None:
    board = Board(["h1:1"], Told({"h1:1": answer}))
    board.look()
    assert len(table_of(board)) == 3 + len(board.nodes)
    assert line_of(board)
    assert drawn(board, 100)


def test_a_node_that_names_ever_more_nodes_is_not_followed_for_ever() -> None:
    peers = [{"node": number, "endpoint": f"x:{number}"} for number in range(2, 1000)]
    board = Board(["h1:1"], Told({"h1:1": picture(1) | {"peers": peers}}))
    board.look()
    assert len(board.nodes) == NODES_MAX


# -- curves --------------------------------------------------------------------------------------------------------------


def seen(uptime_s: float, values: Mapping[float, float]) -> Seen:
    found = Seen("h:1", {"uptime_s": uptime_s}, "")
    found.moments.extend({"at": at, "entries": value} for at, value in values.items())
    return found


def test_a_curve_has_the_greatest_value_of_each_stretch_and_says_where_there_is_none() -> None:
    node = seen(600.0, {200.0: 9.0, 310.0: 5.0, 311.0: 7.0, 595.0: 1.0, 599.0: 2.0})
    assert stretch_s(node, 10) == SPAN_S / 10 == 30.0
    assert curve(node, "entries", 10) == [7.0, *[None] * 8, 2.0]


def test_a_short_past_is_spread_out_and_a_missed_second_is_no_gap() -> None:
    node = seen(10.0, {3.2: 1.0, 4.2: 2.0, 6.1: 3.0, 7.2: 4.0, 8.2: 5.0, 9.2: 6.0})
    assert stretch_s(node, 10) == 1.0
    assert curve(node, "entries", 10) == [None, None, None, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_sparklines() -> None:
    assert sparkline([0.0, 1.0, None, 3.5, 7.0]) == "▁▂ ▅█"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([1.0], top=7.0) == "▂"


def test_numbers_for_people() -> None:
    assert [size(each) for each in (0, 1023, 1024, 5 << 30, None, "x")] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        DASH,
        DASH,
    ]
    assert [milliseconds(each) for each in (0.0, 0.00047, 0.0123, 1.5, None)] == [
        DASH,
        "0.47 ms",
        "12.3 ms",
        "1,500 ms",
        DASH,
    ]


# -- the screen ----------------------------------------------------------------------------------------------------------


def drawn(board: Board, width: int) -> list[str]:
    console = Console(width=width, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(screen_of(board, width))
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_a_screen_keeps_to_its_width_and_cuts_no_number(width: int) -> None:
    board, _ = three(2)
    for _ in range(3):
        board.look()
    lines = drawn(board, width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines[1:])
    text = "\n".join(lines)
    for words in ("node 1 leads in term 3", "h3:1", "12,345", "2,000", "commit p99", "500 ms", "disk"):
        assert words in text
    header = next(line.split() for line in lines if line.startswith("node  endpoint"))
    assert {"node", "endpoint", "role", "applied", "behind", "health"} <= set(header)
    assert ("memory" in header) == (width >= 140)


def test_without_a_leader_the_screen_has_no_curves() -> None:
    board, _ = three(1)
    board.look()
    text = "\n".join(drawn(board, 100))
    assert "does not answer" in text
    assert "commit p99" not in text


# -- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("watch"))
    yield cluster
    cluster.stop()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    status = main(["status", *arguments])
    return status, capsys.readouterr().out.splitlines()


def test_the_status_of_a_cluster(capsys: pytest.CaptureFixture[str], shared: Cluster) -> None:
    leader = shared.leader()
    found: list[tuple[int, list[str]]] = []

    def leads() -> bool:
        """Nodes look at themselves once a second: what they show may be as old."""
        found.append(run(capsys, f"grpc://{shared.config.endpoints[2]}"))
        return found[-1][1][0].startswith(f"cluster test · node {leader} leads in term ")

    eventually(leads, "the leader is shown")
    status, lines = found[-1]
    assert status == 0
    assert lines[2].split("  ")[0] == HEADER[0]
    assert sorted(line.split()[0] for line in lines[3:]) == ["1", "2", "3"]


def test_a_cluster_is_watched_line_by_line(capsys: pytest.CaptureFixture[str], shared: Cluster) -> None:
    url = "grpc://" + ",".join(shared.config.endpoints.values())
    status, lines = run(capsys, url, "--watch", "--count", "2", "--interval", "0.1")
    assert (status, len(lines)) == (0, 2)
    assert all("3 of 3 nodes answer" in line for line in lines)
    status, lines = run(capsys, url, "--watch", "--count", "1", "--json")
    told = json.loads(lines[0])
    assert {node["endpoint"] for node in told["nodes"]} == set(shared.config.endpoints.values())
    assert all(node["problem"] is None and "moments" not in node for node in told["nodes"])


def test_a_real_cluster_has_rates_and_lags(shared: Cluster) -> None:
    shared.create_table("watched")
    leader = shared.leader()
    board, backend = open_board(f"grpc://{shared.config.endpoints[leader]}")

    def written() -> bool:
        shared.put(leader, ("watched", "upsert"), [rows(0, 10)])
        board.look()
        found = board.leader
        return found is not None and bool(found.lags) and any(moment["writes"] > 0 for moment in found.moments)

    try:
        eventually(written, "a rate of writes")
        assert board.leader is not None
        assert set(board.leader.lags) == set(shared.config.voters) - {leader}
        assert "commit p99" in "\n".join(drawn(board, 120))
    finally:
        backend.close()


def test_a_terminal_gets_a_screen(shared: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "marble.cli", "status", "--watch", "--count", "2", "--interval", "0.1"]
    command.append(f"grpc://{shared.config.endpoints[1]}")
    shown = subprocess.run(
        [sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30", "PATH": ""},
        check=True,
    ).stdout
    assert "\x1b[?1049h" in shown  # The other screen of the terminal, and back.
    assert shown.rstrip().endswith("\x1b[?1049l")
    assert "commit p99" in shown


@pytest.mark.parametrize("wrong", [["--count", "3"], ["--watch", "--count", "0"], ["--interval", "0"]])
def test_a_wrong_call_is_status_2(capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    assert main(["status", "grpc://h:1", *wrong]) == 2
    assert capsys.readouterr().err.startswith("marble: ")


def test_a_cluster_that_is_gone_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "grpc://127.0.0.1:1")[0] == 1
