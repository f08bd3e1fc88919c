"""Logs: their form, how repeats are held back, and that nothing of what is written or secret is in them."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from server.cluster import SCHEMA, Cluster, eventually, rows

import marble
from marble.errors import UsageError
from marble.logs import (
    COMPONENTS,
    MESSAGE_CHARACTERS_MAX,
    PLACES_MAX,
    REPEATS_INTERVAL_S,
    REPEATS_MAX,
    Repeats,
    end_logging,
    fields,
)

PACKAGE = Path(marble.__file__).parent
logger = logging.getLogger("marble.node")


@pytest.fixture
def written() -> Iterator[Callable[..., io.StringIO]]:
    """Begins to log; gives what is written."""

    def begin(level: str | int = "INFO", **more: Any) -> io.StringIO:
        stream = io.StringIO()
        marble.initialize_logging(level, stream=stream, **more)
        return stream

    yield begin
    end_logging()


def test_a_line_says_when_how_bad_who_and_what(written: Callable[..., io.StringIO]) -> None:
    stream = written()
    logger.warning("node %d lost node %d", 1, 2, extra=fields(node=1, peer=2))
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING marble\.node: node 1 lost node 2\n", stream.getvalue()
    )


def test_json_is_one_object_a_line_with_the_fields(written: Callable[..., io.StringIO]) -> None:
    stream = written(json_lines=True, node=7)
    logger.info("two\nlines", extra=fields(peer=2, term=None))
    logger.error("of another node", extra=fields(node=3))
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "component": "marble.node",
        "node": 7,
        "peer": 2,
        "message": "two\nlines",
        "thread": "MainThread",
    }
    assert (second["node"], second["level"]) == (3, "error")


def test_a_message_of_several_lines_is_one_line_of_text(written: Callable[..., io.StringIO]) -> None:
    stream = written()
    logger.info("it said %s", "a\r\nfake line")
    logger.info("x" * (2 * MESSAGE_CHARACTERS_MAX))
    first, second = stream.getvalue().splitlines()
    assert first.endswith("it said a\\r\\nfake line")
    assert MESSAGE_CHARACTERS_MAX < len(second) < MESSAGE_CHARACTERS_MAX + 100


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("INFO", 2), (logging.WARNING, 1), ("critical", 0)])
def test_only_what_is_as_bad_as_the_level_is_written(
    written: Callable[..., io.StringIO], level: str | int, count: int
) -> None:
    stream = written(level)
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    assert stream.getvalue().count("\n") == count


def test_a_second_call_replaces_the_first_and_the_end_undoes_it(written: Callable[..., io.StringIO]) -> None:
    first, second = written(), written("ERROR")
    logger.error("once")
    assert (first.getvalue(), second.getvalue().count("once")) == ("", 1)
    end_logging()
    logger.error("nobody hears this")
    assert "nobody" not in second.getvalue()
    root = logging.getLogger("marble")
    assert (root.handlers, root.level, root.propagate) == ([], logging.NOTSET, True)


@pytest.mark.parametrize("wrong", [{"level": "LOUD"}, {"level": 7}, {"level": True}, {"level": None}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be one of"):
        marble.initialize_logging(**wrong)


# -- repeats -------------------------------------------------------------------------------------------------------------


def record(text: str, *arguments: object, line: int = 1) -> logging.LogRecord:
    return logging.LogRecord("marble.node", logging.INFO, "x.py", line, text, arguments, None)


def test_repeats_are_written_so_often_and_then_counted() -> None:
    now = 0.0
    repeats = Repeats(lambda: now)
    through = [repeats.take(record("lost %d", number)) for number in range(REPEATS_MAX + 40)]
    assert [len(lines) for lines in through] == [1] * REPEATS_MAX + [0] * 40
    now = REPEATS_INTERVAL_S
    told, fresh = repeats.take(record("lost %d", 99))
    assert told.getMessage() == f"repeated 40 times more, last: lost {REPEATS_MAX + 39}"
    assert fresh.getMessage() == "lost 99"
    assert repeats.rest() == []


def test_another_place_ends_an_interval_too_and_is_not_held_back() -> None:
    now = 0.0
    repeats = Repeats(lambda: now)
    for number in range(REPEATS_MAX + 1):
        repeats.take(record("a %d", number))
    assert len(repeats.take(record("b"))) == 1
    assert len(repeats.take(record("a %d", 0, line=2))) == 1
    now = REPEATS_INTERVAL_S
    assert [line.getMessage() for line in repeats.take(record("c"))] == [
        f"repeated once more, last: a {REPEATS_MAX}",
        "c",
    ]


def test_a_flood_from_ever_new_places_takes_bounded_memory_and_loses_no_count() -> None:
    repeats = Repeats(lambda: 0.0)
    for _ in range(REPEATS_MAX + 5):
        repeats.take(record("first"))
    lines = [line for number in range(10 * PLACES_MAX) for line in repeats.take(record("other", line=number))]
    assert len(repeats._places) == PLACES_MAX
    assert [line.getMessage() for line in lines if line.lineno == 1 and "first" in line.getMessage()] == [
        "repeated 5 times more, last: first"
    ]


def test_what_was_held_back_is_told_at_the_end(written: Callable[..., io.StringIO]) -> None:
    stream = written(json_lines=True)
    for number in range(REPEATS_MAX + 3):
        logger.warning("again %d", number, extra=fields(node=1))
    end_logging()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == REPEATS_MAX + 1
    assert lines[-1]["message"] == f"repeated 3 times more, last: again {REPEATS_MAX + 2}"
    assert (lines[-1]["repeated"], lines[-1]["node"]) == (3, 1)


# -- what is in them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("json_lines", [False, True])
def test_errors_of_others_are_written_without_their_words(
    written: Callable[..., io.StringIO], json_lines: bool
) -> None:
    stream = written(json_lines=json_lines)

    secret = "SEC" + "RET"  # A traceback shows the source.

    def fail() -> None:
        try:
            pa.array([secret]).cast(pa.int64())
        except pa.ArrowInvalid as error:
            error.add_note(f"{secret}, too")
            raise KeyError(secret) from error

    try:
        fail()
    except KeyError:
        logger.exception("it failed")
    try:
        raise ExceptionGroup("several", [ValueError(secret), UsageError("mend the call")])
    except ExceptionGroup:
        logger.exception("they failed")
    text = stream.getvalue()
    assert secret not in text
    for words in ("ArrowInvalid", "KeyError", "in fail", "mend the call", "may quote data"):
        assert words in text


def test_every_logger_of_the_package_is_a_component() -> None:
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "logs.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
                name = node.args[0]
                assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: name the component in so many words"
                names.add(name.value)
    assert names - COMPONENTS.keys() == set()


def test_a_cluster_logs_its_life_and_nothing_that_was_written_to_it(
    written: Callable[..., io.StringIO], make_cluster: Callable[..., Cluster]
) -> None:
    marker = "MARKER" * 3
    stream = written("DEBUG", json_lines=True)
    cluster = make_cluster(3)
    cluster.create_table("t")
    leader = cluster.leader()
    cluster.put(leader, ("t", "upsert"), [rows(0, 100, marker)])
    cluster.servers[leader].propose_operation(marker.encode())
    # What clients get wrong must not come out in logs either.
    client = cluster.client(leader)
    for action in (flight.Action("create_table", marker.encode()), flight.Action(marker, b"")):
        with pytest.raises(flight.FlightError):
            list(client.do_action(action))
    for command in (marker.encode(), b"marble.raft/1"):
        with pytest.raises((flight.FlightError, pa.ArrowException)):
            exchange(client, command, marker)
    cluster.stop_node(leader)
    eventually(cluster.leader, "another leader")
    cluster.stop()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {line["component"] for line in lines} >= {"marble.node", "marble.raft", "marble.transport"}
    assert {line["node"] for line in lines if line["component"] == "marble.raft"} == {1, 2, 3}
    assert marker not in stream.getvalue()
    assert marker.encode().hex() not in stream.getvalue()


def exchange(client: flight.FlightClient, command: bytes, marker: str) -> None:
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command))
    writer.begin(SCHEMA)
    writer.write_with_metadata(rows(0, 1, marker), marker.encode())
    reader.read_all()


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(nodes: int) -> Cluster:
        made.append(Cluster(tmp_path, nodes))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()
