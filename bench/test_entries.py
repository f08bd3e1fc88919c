"""Encoding, building, verifying and admitting entries, beside a copy and a bare XXH3 of the same bytes.

    pytest bench/test_entries.py --benchmark-enable --benchmark-group-by=group --benchmark-columns=median,ops

Each group has the floor in it: read the ratios, not the times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.checksum import xxh3_64
from marble._core.entry_batch import Proposal
from marble.types import EntryKind

SIZES = {"1KiB": 128, "64KiB": 8192, "1MiB": 131072}
"""Rows of one int64 column in a table write."""


def rows_of(size: str) -> pa.RecordBatch:
    return pa.record_batch({"a": np.arange(SIZES[size], dtype=np.int64)})


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def grouped(benchmark: Any, name: str, size: str) -> Any:
    benchmark.group = f"{name} {size}"
    return benchmark


def copy(source: np.ndarray, target: np.ndarray) -> None:
    np.copyto(target, source)


def test_floor_copy_for_encode(benchmark: Any, size: str) -> None:
    source = np.frombuffer(entry_batch.encode_payload(rows_of(size)), np.uint8)
    grouped(benchmark, "encode", size)(copy, source, np.empty_like(source))


def test_encode_payload(benchmark: Any, size: str) -> None:
    grouped(benchmark, "encode", size)(entry_batch.encode_payload, rows_of(size))


def test_decode_payload(benchmark: Any, size: str) -> None:
    batch = rows_of(size)
    grouped(benchmark, "decode", size)(entry_batch.decode_payload, entry_batch.encode_payload(batch), batch.schema)


def test_floor_arrow_decode(benchmark: Any, size: str) -> None:
    batch = rows_of(size)
    grouped(benchmark, "decode", size)(pa.ipc.read_record_batch, entry_batch.encode_payload(batch), batch.schema)


def test_floor_hash(benchmark: Any, size: str) -> None:
    grouped(benchmark, "checksum", size)(xxh3_64, entry_batch.encode_payload(rows_of(size)))


def test_proposal(benchmark: Any, size: str) -> None:
    grouped(benchmark, "checksum", size)(Proposal, EntryKind.WRITE, 1, entry_batch.encode_payload(rows_of(size)), 1, 1)


def test_verify_one(benchmark: Any, size: str) -> None:
    payload = entry_batch.encode_payload(rows_of(size))
    batch = entry_batch.build(0, 1, 1, [Proposal(EntryKind.WRITE, 1, payload)])
    grouped(benchmark, "checksum", size)(entry_batch.verify, batch)


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("step", ["floor copy", "build", "verify", "check_contiguous", "span", "admit"])
def test_many_of_1_kib(benchmark: Any, step: str, count: int) -> None:
    proposals = [Proposal(EntryKind.WRITE, 1, entry_batch.encode_payload(rows_of("1KiB")))] * count
    batch = entry_batch.build(0, 1, 1, proposals)
    benchmark.group = f"{count} entries of 1 KiB"
    if step == "floor copy":
        source = np.zeros(sum(proposal.nbytes for proposal in proposals), np.uint8)
        benchmark(copy, source, np.empty_like(source))
    elif step == "build":
        benchmark(entry_batch.build, 0, 1, 1, proposals)
    elif step == "admit":
        benchmark(entry_batch.admit, batch, 1 << 30)
    else:
        benchmark(getattr(entry_batch, step), batch)
