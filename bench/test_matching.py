"""AppendEntries matching: where a follower's log and a leader's entries part. The floor is the same comparison in NumPy; the twin in plain
Python shows what the kernel spares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from marble._core.term_index import EntrySpan, TermIndex

COUNTS = [64, 10_000]


def terms_of(count: int) -> list[int]:
    """A term for every 100 entries; the last entry differs from the leader's."""
    return [1 + index // 100 for index in range(count)]


def make(count: int) -> tuple[TermIndex, EntrySpan]:
    ours, theirs = terms_of(count), terms_of(count)
    theirs[-1] += 1
    log = TermIndex()
    log.append(EntrySpan.of(1, ours))
    return log, EntrySpan.of(1, theirs)


@pytest.mark.parametrize("count", COUNTS)
def test_first_conflict(benchmark: Any, count: int) -> None:
    benchmark.group = f"matching {count} entries"
    log, span = make(count)
    assert benchmark(log.first_conflict, span) == count


@pytest.mark.parametrize("count", COUNTS)
def test_floor_numpy(benchmark: Any, count: int) -> None:
    benchmark.group = f"matching {count} entries"
    ours = np.array(terms_of(count), np.uint64)
    theirs = ours.copy()
    theirs[-1] += 1
    assert benchmark(lambda: int(np.argmax(ours != theirs))) == count - 1


@pytest.mark.parametrize("count", COUNTS)
def test_plain_python(benchmark: Any, count: int) -> None:
    benchmark.group = f"matching {count} entries"
    ours, theirs = terms_of(count), terms_of(count)
    theirs[-1] += 1
    assert benchmark(lambda: next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]))
