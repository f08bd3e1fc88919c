"""Appending to the log, with and without a sync, beside a bare write and fdatasync of the same bytes; reading; opening.

    pytest bench/test_log.py --benchmark-enable --benchmark-group-by=group --benchmark-columns=median,ops

Each group has the floor in it: read the ratios, not the times.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.env import SystemAppendFile, SystemFiles
from marble.logstore.log import Log, LogOptions
from marble.types import EntryKind, HardState

ROWS = {"1KiB": 128, "64KiB": 8192, "1MiB": 131072}
"""Rows of one int64 column in a table write."""


@pytest.fixture(params=ROWS)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def proposal_of(size: str) -> Proposal:
    batch = pa.record_batch({"a": np.arange(ROWS[size], dtype=np.int64)})
    return Proposal(EntryKind.WRITE, 1, entry_batch.encode_payload(batch))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    opened = Log.open(SystemFiles(tmp_path), LogOptions(segment_bytes_max=256 << 20))
    yield opened
    opened.close()


def frame_bytes(proposal: Proposal) -> int:
    """What the log writes for one entry and a hard state."""
    return proposal.nbytes + 768 + 10 * 64


def entries(proposal: Proposal) -> Iterator[tuple[HardState, pa.RecordBatch]]:
    for index in itertools.count(1):
        yield HardState(1, 1, index - 1), entry_batch.build(1, index, 1, [proposal])


def test_floor_write_and_fdatasync(benchmark: Any, size: str, tmp_path: Path) -> None:
    benchmark.group = f"append and sync {size}"
    data = os.urandom(frame_bytes(proposal_of(size)))
    file = SystemFiles(tmp_path).create("floor")

    def write_and_sync() -> None:
        file.write(data)
        file.sync()

    benchmark.pedantic(write_and_sync, rounds=200, warmup_rounds=20)
    file.close()


def test_append_and_sync(benchmark: Any, size: str, log: Log) -> None:
    benchmark.group = f"append and sync {size}"
    made = entries(proposal_of(size))

    def write_and_sync(hard_state: HardState, batch: pa.RecordBatch) -> None:
        log.append(1, hard_state, batch)
        log.sync()

    benchmark.pedantic(write_and_sync, setup=lambda: (next(made), {}), rounds=200, warmup_rounds=20)


def test_floor_write(benchmark: Any, size: str, tmp_path: Path) -> None:
    benchmark.group = f"append without sync {size}"
    data = os.urandom(frame_bytes(proposal_of(size)))
    file = SystemFiles(tmp_path).create("floor")
    benchmark.pedantic(file.write, args=(data,), rounds=200, warmup_rounds=20)
    file.close()


def test_append_without_sync(benchmark: Any, size: str, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the log does but the fdatasync: encoding, hashing, the write and the mark's."""
    benchmark.group = f"append without sync {size}"
    monkeypatch.setattr(SystemAppendFile, "sync", lambda file: None)
    made = entries(proposal_of(size))

    def write(hard_state: HardState, batch: pa.RecordBatch) -> None:
        log.append(1, hard_state, batch)
        log.sync()

    benchmark.pedantic(write, setup=lambda: (next(made), {}), rounds=200, warmup_rounds=20)


def test_hundred_appends_one_sync(benchmark: Any, log: Log) -> None:
    benchmark.group = "append and sync 1KiB"
    made = entries(proposal_of("1KiB"))

    def write_and_sync(*batches: tuple[HardState, pa.RecordBatch]) -> None:
        for hard_state, batch in batches:
            log.append(1, hard_state, batch)
        log.sync()

    benchmark.pedantic(
        write_and_sync, setup=lambda: (tuple(next(made) for _ in range(100)), {}), rounds=50, warmup_rounds=5
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> SystemFiles:
    """A log of 20,000 entries of 1 KiB in frames of ten."""
    files = SystemFiles(tmp_path_factory.mktemp("filled"))
    log = Log.open(files)
    for first in range(1, 20_000, 10):
        log.append(1, None, entry_batch.build(1, first, 1, [proposal_of("1KiB")] * 10))
        log.sync()
    log.close()
    return files


def test_floor_read_file(benchmark: Any, filled: SystemFiles) -> None:
    benchmark.group = "20,000 entries of 1KiB"
    benchmark.pedantic(filled.read, args=("log/0000000000000001.arrows",), rounds=10)


def test_open(benchmark: Any, filled: SystemFiles) -> None:
    benchmark.group = "20,000 entries of 1KiB"
    benchmark.pedantic(Log.open, args=(filled, None, False), rounds=10)


def test_replay_from_disk(benchmark: Any, filled: SystemFiles) -> None:
    benchmark.group = "20,000 entries of 1KiB"
    log = Log.open(filled, LogOptions(cache_bytes_max=0), writable=False)
    assert benchmark.pedantic(lambda: sum(b.num_rows for b in log.replay(1, 1, 20_001)), rounds=10) == 20_000
