"""A node on a real port against calls that are nearly right: see `fuzz.live`. As in `fuzz.test_fuzz`, the same ones each time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest
from fuzz.live import Live, actions_without_seed, live_node
from fuzz.mutate import Change, changed
from fuzz.target import Target, join, split
from fuzz.test_fuzz import CHANGES, DRAWN, EXAMPLES, SEED
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_node(tmp_path_factory.mktemp("node")) as found:
        yield found


@pytest.fixture
def target(live: Live, caplog: pytest.LogCaptureFixture) -> Iterator[Target]:
    threads = threading.active_count()
    with caplog.at_level(logging.ERROR, "marble"):
        yield live.target()
    # What a handler did not expect is logged with its trace.
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert threading.active_count() <= threads + 16, "calls that ended left threads behind"


def test_nearly_right_calls(target: Target) -> None:
    seeds = tuple(target.seeds())
    taken = sum(target.attack(data) for data in seeds)
    assert taken >= len(seeds) // 2, "most calls are right as they are"

    @DRAWN
    @given(st.integers(0, len(seeds) - 1), CHANGES)
    def attack(number: int, changes: list[Change]) -> None:
        target.attack(changed(seeds[number], changes, seeds))

    (seed(SEED)(attack) if SEED else attack)()


@pytest.mark.parametrize("part", range(5), ids=["verb", "place", "body", "headers", "batch"])
def test_one_part_is_anything(target: Target, part: int) -> None:
    """The others are right, so that it is what decides."""
    seeds = tuple(target.seeds())

    @settings(
        max_examples=max(1, EXAMPLES // 2),
        derandomize=not SEED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.integers(0, len(seeds) - 1),
        st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    )
    @example(0, b"")
    def attack(number: int, data: bytes) -> None:
        parts = split(seeds[number], 5)
        parts[part] = data
        target.attack(join(*parts))

    (seed(SEED)(attack) if SEED else attack)()


@pytest.mark.parametrize("name", actions_without_seed())
@pytest.mark.parametrize("body", [b"", b"{}", b"[" * 3000, b'{"token":null}', bytes(100), b"\xff\xfe"])
def test_other_actions_by_name(target: Target, name: str, body: bytes) -> None:
    target.attack(join(b"\0", name.encode(), body, b"", b""))
