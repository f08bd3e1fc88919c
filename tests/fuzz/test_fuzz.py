"""Every parser of strange bytes against bytes that are nearly right: it takes them, or refuses them as it promises, and does nothing else.

The same examples each time, so that a change is judged by itself. ``MARBLE_TEST_SEED=n`` draws others, ``MARBLE_FUZZ_EXAMPLES=n``
decides how many for each parser. What atheris does with the same targets for hours is in `docs/testing.md`.
"""

from __future__ import annotations

import os
from functools import cache

import pyarrow as pa
import pytest
from fuzz.mutate import KINDS, Change, changed
from fuzz.target import Finding, Target, stream_of
from fuzz.targets import TARGETS
from fuzz.wire_targets import SCHEMA
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from marble.errors import UsageError

SEED = int(os.environ.get("MARBLE_TEST_SEED", "0"))
EXAMPLES = int(os.environ.get("MARBLE_FUZZ_EXAMPLES", "150"))
DRAWN = settings(
    max_examples=EXAMPLES,
    derandomize=not SEED,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
WORD = st.integers(0, 2**16 - 1)
CHANGES = st.lists(st.builds(Change, st.sampled_from(KINDS), WORD, WORD, WORD), min_size=1, max_size=5)


@cache
def seeds_of(name: str) -> tuple[bytes, ...]:
    (target,) = [each for each in TARGETS if each.name == name]
    return tuple(target.seeds())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name.replace(" ", "_"))
def test_nearly_right_bytes(target: Target) -> None:
    seeds = seeds_of(target.name)
    for data in seeds:
        assert target.attack(data), "a valid input is refused"
        assert target.attack(target.mend(data)), "what is mended and was not broken is refused"

    @DRAWN
    @given(st.integers(0, len(seeds) - 1), CHANGES, st.booleans())
    def attack(number: int, changes: list[Change], mended: bool) -> None:
        data = changed(seeds[number], changes, seeds)
        target.attack(target.mend(data) if mended else data)

    (seed(SEED)(attack) if SEED else attack)()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name.replace(" ", "_"))
def test_mending_reaches_behind_the_checksums(target: Target) -> None:
    """Of inputs with one byte changed, some are taken: else nothing behind the checksum was ever looked at."""
    taken = 0
    for data in seeds_of(target.name):
        for place in range(0, 2**16, 512):
            broken = changed(data, [Change("flip", place, place // 512, 0)], seeds_of(target.name))
            taken += target.attack(target.mend(broken))
    assert taken, "no changed input was ever taken"


FOUND = (
    ("error", b"[" * 3000),
    ("error", b'{"code": {}, "message": "no"}'),
    ("changes", b'{"changes":[{"kind":"add-voter","node":4,"endpoint":"\\u0000"}]}'),
    ("url", b"grpc://[::1]:\0@.0.0.1:5002"),
    ("config", b"a = " + b"9" * 5000),
    ("config", b"a = " + b"[" * 3000),
    ("identity", b"[" * 3000),
    ("identity", b'"\\ud800"'),
    ("acquaintances", b'{"met": ' + b"[" * 3000),
    ("schema", SCHEMA.serialize().to_pybytes().replace(b"name", b"n\xe1me")),
    ("tokens", b"a = " + b"9" * 5000),
    ("request", b"GET / HTTP/1.1\r\nHost: a[b\r\n\r\n"),
    ("snapshot", seeds_of("snapshot")[0].replace(b'"rows": "0', b'"rows": "-')),
    ("batch", stream_of(pa.record_batch({"i\x1b": [1]}))),
    ("batch", stream_of(pa.record_batch({"idid": [1]})).replace(b"idid", b"i\xff\xffd")),
)
"""What once was answered with something else than a refusal."""


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_before(name: str, data: bytes) -> None:
    (target,) = [each for each in TARGETS if each.name == name]
    # What is told of a server's error is always one of ours, so there is nothing to refuse.
    assert target.attack(data) is (name == "error")


def _raises(error: Exception) -> Target:
    def parse(data: bytes) -> None:
        raise error

    return Target("broken", lambda: [b""], parse, (UsageError,))


def test_what_a_parser_did_not_promise_is_a_finding() -> None:
    assert _raises(UsageError("wrong")).attack(b"") is False
    for error in (KeyError("x"), RecursionError("deep"), AssertionError("no"), MemoryError(), UsageError("\x1b[2J")):
        with pytest.raises(Finding):
            _raises(error).attack(b"")


def test_memory_out_of_proportion_is_a_finding() -> None:
    greedy = Target("greedy", lambda: [b""], lambda data: bytearray(b"x") * 2**29, ())
    with pytest.raises(Finding, match="bytes of memory"):
        greedy.attack(b"")
