"""What the benchmarks beside other stores do: the data, where it lies, and the ways to read and write it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol

import pyarrow as pa

BATCH_ROWS: Final = 1000
GROUPS: Final = 100
"""Different beginnings of keys: a prefix scan reads one of so many parts."""
SCHEMA: Final = pa.schema([pa.field("k", pa.binary(), nullable=False), pa.field("v", pa.binary())])

Pair = tuple[bytes, bytes]


@dataclass(frozen=True)
class Shape:
    """How much data, and how long. Keys are random, in `GROUPS` groups; values are random bytes."""

    rows: int
    key_bytes: int = 24
    value_bytes: int = 100

    @property
    def nbytes(self) -> int:
        return self.rows * (self.key_bytes + self.value_bytes)

    @cached_property
    def keys(self) -> list[bytes]:
        """In order."""
        rng, digits = random.Random(7), self.key_bytes - 5
        made: set[bytes] = set()
        while len(made) < self.rows:
            group = len(made) * GROUPS // self.rows
            made.add(b"%04d/" % group + f"{rng.getrandbits(4 * digits):0{digits}x}".encode())
        return sorted(made)

    @cached_property
    def pairs(self) -> list[Pair]:
        """All rows in the order in which they are written, which is none."""
        rng = random.Random(8)
        pairs = [(key, rng.randbytes(self.value_bytes)) for key in self.keys]
        rng.shuffle(pairs)
        return pairs

    @cached_property
    def batches(self) -> list[list[Pair]]:
        return [self.pairs[first : first + BATCH_ROWS] for first in range(0, self.rows, BATCH_ROWS)]

    @cached_property
    def arrow_batches(self) -> list[pa.RecordBatch]:
        return [arrow(batch) for batch in self.batches]

    @cached_property
    def singles(self) -> list[tuple[Pair, pa.RecordBatch]]:
        """Some rows alone, which are few: a sync of its own for each takes its time."""
        return [(pair, arrow([pair])) for pair in self.pairs[: min(2000, self.rows // 10)]]


def arrow(pairs: Sequence[Pair]) -> pa.RecordBatch:
    keys, values = zip(*pairs, strict=True)
    return pa.record_batch([pa.array(keys, pa.binary()), pa.array(values, pa.binary())], schema=SCHEMA)


class Keys:
    """Keys to be read, in both forms."""

    def __init__(self, keys: list[bytes]) -> None:
        self.listed = keys
        self.arrow = pa.record_batch([pa.array(keys, pa.binary())], names=["k"])


@dataclass(frozen=True)
class Layout:
    """Where the data lies when it is read.

    - ``runs``: overlapping sorted files; 0: all of it in the memtable.
    - ``cache_share``: the block cache's part of the data; 0: everything fits.
    - ``counted``: whether RocksDB counts what it does, which takes time.
    """

    name: str
    runs: int
    cache_share: float = 0.0
    counted: bool = False

    def cache_bytes(self, shape: Shape) -> int:
        return int(shape.nbytes * self.cache_share) if self.cache_share else 1 << 30


LAYOUTS: Final = (
    Layout("memtable", 0),
    Layout("1 run", 1),
    Layout("8 runs", 8),
    Layout("1 run, cache 1/4", 1, 0.25),
)


class Store(Protocol):
    """One key-value store in a directory of its own."""

    name: str

    def write(self, shape: Shape, first: int, end: int, *, sync: bool) -> None:
        """Write the batches ``[first, end)`` of `shape`, each with a sync of its own if `sync`."""
        ...

    def put(self, singles: Sequence[tuple[Pair, pa.RecordBatch]], *, sync: bool) -> None:
        """Write these rows one by one, each given in both forms."""
        ...

    def flush(self) -> None:
        """Bring what is in memory into one sorted file."""
        ...

    def get(self, keys: Sequence[bytes]) -> None:
        """Read these keys one by one."""
        ...

    def get_many(self, keys: Keys) -> int:
        """Read these keys by one call. Returns how many there were."""
        ...

    def scan(self) -> int:
        """Read everything in order. Returns how many rows there were."""
        ...

    def prefix(self, prefix: bytes) -> int: ...
    def between(self, first: bytes, last: bytes) -> int: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Read:
    """A way to read: `run` reads what `pick` has chosen by a number, and returns how many rows it was."""

    name: str
    pick: Callable[[Shape, int], Any]
    run: Callable[[Store, Any], int]
    target: float | None
    """How many times as fast as rocksdict marble is to be, at least."""
    aim: float | None


def _keys(shape: Shape, seed: int) -> Keys:
    return Keys(random.Random(seed).choices(shape.keys, k=1000))


def _get(store: Store, keys: Keys) -> int:
    store.get(keys.listed)
    return len(keys.listed)


PREFIXES: Final = 10
"""Prefix scans of one measurement. One alone takes a few 0.1 ms, most of which is fetching code and data that other stores' work
has driven out of the processor's caches; that is shown on a line of its own."""
RANGES: Final = 3
"""Range scans of one measurement."""


def _prefixes(shape: Shape, seed: int, count: int = PREFIXES) -> list[bytes]:
    return [b"%04d/" % (number % GROUPS) for number in range(seed * count, seed * count + count)]


def _ranges(shape: Shape, seed: int) -> list[Pair]:
    starts = [(seed * RANGES + i) * 31 % 90 * shape.rows // 100 for i in range(RANGES)]
    return [(shape.keys[first], shape.keys[first + shape.rows // 10 - 1]) for first in starts]


def _scan_prefixes(store: Store, prefixes: list[bytes]) -> int:
    return sum(store.prefix(prefix) for prefix in prefixes)


def _scan_ranges(store: Store, ranges: list[Pair]) -> int:
    return sum(store.between(*bounds) for bounds in ranges)


READS: Final = (
    Read("get", _keys, _get, 1.0, 2.0),
    Read("get_many(1000)", _keys, lambda store, keys: store.get_many(keys), 2.5, 5.0),
    Read("full scan", lambda shape, seed: None, lambda store, _: store.scan(), 5.0, 20.0),
    Read("prefix scan, 1 %", _prefixes, _scan_prefixes, 5.0, 20.0),
    Read("prefix scan, 1 %, one alone", lambda shape, seed: _prefixes(shape, seed, 1), _scan_prefixes, None, None),
    Read("range scan, 10 %", _ranges, _scan_ranges, 5.0, 20.0),
)


@dataclass(frozen=True)
class Write:
    """A way to write all of a shape, or its single rows, into an empty store; `run` returns how many rows it wrote."""

    name: str
    run: Callable[[Store, Shape], int]
    target: float | None
    aim: float | None


def _batches(sync: bool) -> Callable[[Store, Shape], int]:
    def run(store: Store, shape: Shape) -> int:
        store.write(shape, 0, len(shape.batches), sync=sync)
        return shape.rows

    return run


def _puts(sync: bool) -> Callable[[Store, Shape], int]:
    def run(store: Store, shape: Shape) -> int:
        store.put(shape.singles, sync=sync)
        return len(shape.singles)

    return run


WRITES: Final = (
    Write("batches of 1000, synced", _batches(True), 2.0, 5.0),
    Write("batches of 1000, unsynced", _batches(False), None, None),
    Write("single puts, synced", _puts(True), None, None),
    Write("single puts, unsynced", _puts(False), None, None),
)
