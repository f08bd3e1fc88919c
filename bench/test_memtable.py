"""Memtable: insert, get and scan, each beside a floor measured in the same run.

Run: ``pytest bench/test_memtable.py --benchmark-enable --benchmark-columns=median,ops``. Each ``extra_info`` says how
many rows a second it is, what the floor took, and the ratio of the two (1.0 would be the floor itself).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from marble._core.memtable import Memtable, Snapshot

ROWS = 1_000_000
BATCH_ROWS = 1_000
SCHEMA = pa.schema([("k", pa.int64()), ("a", pa.int64()), ("b", pa.float64()), ("s", pa.string())])


def keys_of(order: str) -> np.ndarray:
    keys = np.arange(ROWS)
    return keys if order == "ascending" else np.random.default_rng(7).permutation(keys)


def batches_of(keys: np.ndarray) -> list[pa.RecordBatch]:
    strings = pa.array([f"value {key % 1000}" for key in range(1000)]).take(pa.array(keys % 1000))
    columns = [pa.array(keys), pa.array(keys * 3), pa.array(keys * 0.5), strings]
    return pa.Table.from_arrays(columns, schema=SCHEMA).to_batches(max_chunksize=BATCH_ROWS)


def fill(batches: list[pa.RecordBatch]) -> Memtable:
    table = Memtable(SCHEMA, ["k"])
    for index, batch in enumerate(batches, 1):
        table.upsert(batch, index)
    return table


def seconds(floor: Callable[[], object], rounds: int = 5) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        floor()
        best = min(best, time.perf_counter() - started)
    return best


def report(benchmark: BenchmarkFixture, rows: int, floor_name: str, floor_s: float) -> None:
    if benchmark.stats is None:  # Benchmarks are switched off: the run was a test only.
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info["rows_per_second"] = round(rows / median)
    benchmark.extra_info[f"floor_{floor_name}_rows_per_second"] = round(rows / floor_s)
    benchmark.extra_info["ratio_to_floor"] = round(median / floor_s, 2)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return fill(batches_of(keys_of("shuffled"))).snapshot()


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_insert_batches_of_1000(benchmark: BenchmarkFixture, order: str) -> None:
    """Floor: numpy sorts the same keys once (argsort, since rows must be found again)."""
    keys = keys_of(order)
    batches = batches_of(keys)
    table = benchmark.pedantic(fill, args=(batches,), rounds=5, warmup_rounds=1)
    assert table.snapshot().row_count == ROWS
    report(benchmark, ROWS, "numpy_argsort", seconds(lambda: np.argsort(keys, kind="stable")))


@pytest.mark.parametrize("count", [1, 1000])
def test_get_many(benchmark: BenchmarkFixture, snapshot: Snapshot, count: int) -> None:
    """Floor: a Python dict finds the same keys, without making the rows."""
    wanted = np.random.default_rng(3).integers(0, ROWS, count)
    keys = pa.record_batch([pa.array(wanted)], names=["k"])
    _, found = benchmark(snapshot.get_many, keys)
    assert found.true_count == count
    index = dict.fromkeys(range(ROWS), 0)
    asked = wanted.tolist()
    report(benchmark, count, "dict", seconds(lambda: [index.get(key) for key in asked], 50))


def test_scan(benchmark: BenchmarkFixture, snapshot: Snapshot) -> None:
    """Floor: Arrow's take puts the same rows, in one batch, into the same order."""
    batch = pa.Table.from_batches(batches_of(keys_of("shuffled"))).combine_chunks().to_batches()[0]
    order = pa.array(np.argsort(batch["k"].to_numpy()))

    def scan() -> int:
        return sum(part.num_rows for part in snapshot.scan())

    assert benchmark.pedantic(scan, rounds=5, warmup_rounds=1) == ROWS
    report(benchmark, ROWS, "arrow_take", seconds(lambda: batch.take(order)))
