"""The same work by marble, RocksDB and LMDB, small by default: ``--bench-rows`` says how small. ``report.py`` makes the table.

One group for each way of working: pytest-benchmark prints each median's multiple of the fastest of its group in brackets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers
import pytest
from amplification import NO_CACHE, PROBES, reading
from peers import PEERS, Form, Marble
from work import LAYOUTS, RANGES, READS, WRITES, Layout, Read, Shape, Store, Write

NAMES = ["marble-arrow", "marble-bytes", "rocksdict", "lmdb"]


def opened(name: str, path: Path, shape: Shape, layout: Layout | None) -> Store:
    """The peer of this name, or a skip that says what is missing."""
    peer, _, form = name.partition("-")
    if peer != "marble":
        pytest.importorskip(peer, reason=f"{peer} is not installed: pip install 'marbledb[bench]'")
    store = PEERS[peer](path, shape, layout)
    return store.other(Form.BYTES) if isinstance(store, Marble) and form == "bytes" else store


@pytest.fixture(scope="session")
def shape(request: pytest.FixtureRequest) -> Shape:
    return Shape(request.config.getoption("--bench-rows"))


@pytest.fixture(scope="module")
def loaded(
    request: pytest.FixtureRequest, shape: Shape, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Store, Layout]]:
    name, layout = request.param
    store = opened(name, tmp_path_factory.mktemp("store"), shape, layout)
    try:
        peers.load(store, shape, layout)
        yield store, layout
    finally:
        store.close()


LOADED = [pytest.param((name, layout), id=f"{layout.name}-{name}") for layout in LAYOUTS for name in NAMES]


@pytest.mark.parametrize("loaded", LOADED, indirect=True)
@pytest.mark.parametrize("read", READS, ids=lambda read: read.name)
def test_read(benchmark: Any, shape: Shape, loaded: tuple[Store, Layout], read: Read) -> None:
    store, layout = loaded
    benchmark.group = f"{read.name}, {layout.name}"
    picked = read.pick(shape, 1)
    rows = benchmark(read.run, store, picked)
    assert rows == {"full scan": shape.rows, "range scan, 10 %": RANGES * (shape.rows // 10)}.get(read.name, rows)
    assert rows > 0


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.name)
@pytest.mark.parametrize("name", NAMES)
def test_write(benchmark: Any, shape: Shape, tmp_path: Path, name: str, write: Write) -> None:
    benchmark.group = write.name
    store = opened(name, tmp_path, shape, None)
    try:
        rows = benchmark.pedantic(write.run, args=(store, shape), rounds=1)
        assert rows in (shape.rows, len(shape.singles))
    finally:
        store.close()


@pytest.mark.parametrize("scans", [0, 1], ids=["alone", "and-scan"])
@pytest.mark.parametrize("percent", [10, 100])
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", ["marble-arrow", "rocksdict"])
def test_delete_range(
    benchmark: Any, shape: Shape, tmp_path: Path, name: str, layout: Layout, percent: int, scans: int
) -> None:
    """RocksDB writes a note that its readers heed from then on; marble counts the rows, and answers how many there were."""
    benchmark.group = f"delete of a range of {percent} %{' and a full scan' * scans}, {layout.name}"
    store = opened(name, tmp_path, shape, layout)
    assert isinstance(store, Marble | peers.Rocks)
    left = shape.rows - shape.rows * percent // 100

    def work() -> None:
        store.delete_range(shape.keys[0], shape.keys[shape.rows - left - 1])
        for _ in range(scans):
            assert store.scan() == left

    try:
        peers.load(store, shape, layout)
        benchmark.pedantic(work, rounds=1)
        assert store.scan() == left
    finally:
        store.close()


@pytest.mark.parametrize("name", ["marble", "rocksdict", "lmdb"])
def test_read_amplification(shape: Shape, tmp_path: Path, name: str) -> None:
    """No time is measured: it says how many blocks a look-up fetches when none is cached."""
    store = opened(name, tmp_path, shape, NO_CACHE)
    peers.load(store, shape, LAYOUTS[1])
    store.close()
    blocks, nbytes = reading(PEERS[name], shape, tmp_path)
    assert 0 < blocks <= PROBES
    assert nbytes > 0
