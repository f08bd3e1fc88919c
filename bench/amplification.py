"""How much more is written, read and kept than there is, after everything has been overwritten ten times.

- Write: bytes that the process handed to the disk (``/proc/self/io``), logs and merges included, for each byte of rows written.
- Space: bytes of the directory once all is quiet, for each byte of rows that live; of marble, which of its files have how much of it.
- Read: blocks that a look-up of a key at random fetches, with a cache that holds none, and about how many bytes these have.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peers import Lmdb, Marble, Rocks, installed
from work import Layout, Shape, Store

OVERWRITES: Final = 10
PROBES: Final = 2000
QUIET_S: Final = 5.0
"""Nothing has been written for so long: merges are over, and what they have replaced is gone."""
QUIET_WAIT_S: Final = 300.0
NO_CACHE: Final = Layout("no cache", 0, 1e-9, counted=True)


@dataclass(frozen=True)
class Amplification:
    write: float
    space: float
    blocks_read: float
    bytes_read: float
    parts: dict[str, float]
    """What ``space`` consists of."""


def written() -> int:
    """Bytes that this process has had written so far."""
    found = re.search(r"^write_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def size(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


def wait_until_quiet() -> None:
    deadline, before, since = time.monotonic() + QUIET_WAIT_S, written(), time.monotonic()
    while time.monotonic() - since < QUIET_S:
        if time.monotonic() > deadline:
            raise SystemExit("the stores go on writing")
        time.sleep(0.1)
        now = written()
        if now != before:
            before, since = now, time.monotonic()


def measure(make: Callable[[Path, Shape, Layout | None], Store], shape: Shape, path: Path) -> Amplification:
    before = written()
    store = make(path, shape, None)
    for _ in range(OVERWRITES + 1):
        store.write(shape, 0, len(shape.batches), sync=False)
    store.flush()
    wait_until_quiet()
    put = written() - before
    kept, parts = size(path), kept_by(store, path)
    store.close()
    blocks, nbytes = reading(make, shape, path)
    return Amplification(
        put / ((OVERWRITES + 1) * shape.nbytes),
        kept / shape.nbytes,
        blocks,
        nbytes,
        {part: found / shape.nbytes for part, found in parts.items()},
    )


def kept_by(store: Store, path: Path) -> dict[str, int]:
    """Bytes of a quiet marble's log, of the files of its tables, and of files that are no part of these any more. Of others nothing."""
    if not isinstance(store, Marble):
        return {}
    live = {ref.name for ref in store.machine.live()}
    tables = [file for file in (path / "tables").iterdir() if file.name[9:-6] in live]
    whole, log, used = size(path), size(path / "log"), sum(file.stat().st_blocks * 512 for file in tables)
    return {"log": log, "tables": used, "rest": whole - log - used}


def reading(make: Callable[[Path, Shape, Layout | None], Store], shape: Shape, path: Path) -> tuple[float, float]:
    """Blocks and bytes that one look-up fetches."""
    store: Any = make(path, shape, NO_CACHE)
    try:
        probe = PROBING[type(store)]
        probe(store)  # Counts from here on.
        keys = random.Random(1).choices(shape.keys, k=PROBES)
        store.get(keys)
        blocks, block_bytes = probe(store)
        return blocks / PROBES, blocks * block_bytes / PROBES
    finally:
        store.close()


def _marble_blocks(store: Marble) -> tuple[float, float]:
    cache = store.cache
    misses = cache.misses - getattr(store, "misses_before", 0)
    store.misses_before = cache.misses
    files = [file.info for level in store.machine.read("t").snapshot.files for file in level]
    return misses, sum(info.nbytes for info in files) / max(1, sum(info.block_count for info in files))


def _rocks_blocks(store: Rocks) -> tuple[float, float]:
    text = store.statistics()
    tickers = {name: int(value) for name, value in re.findall(r"(\S+) COUNT : (\d+)", text)}
    misses = tickers["rocksdb.block.cache.data.miss"] - getattr(store, "misses_before", 0)
    store.misses_before = tickers["rocksdb.block.cache.data.miss"]
    return misses, 4096.0


def _lmdb_blocks(store: Lmdb) -> tuple[float, float]:
    stat = store.stat()
    return PROBES * stat["depth"], stat["psize"]


PROBING: Final[dict[type, Callable[[Any], tuple[float, float]]]] = {
    Marble: _marble_blocks,
    Rocks: _rocks_blocks,
    Lmdb: _lmdb_blocks,
}


def amplification_report(shape: Shape, base: Path | None) -> None:
    """Print a line for each store."""
    if not sys.platform.startswith("linux"):
        print("only Linux tells what a process has written")
        return
    print("| | written per byte | kept per byte | blocks fetched per get | KiB fetched per get |")
    print("|---|---:|---:|---:|---:|")
    for name, make in installed().items():
        with tempfile.TemporaryDirectory(dir=base, prefix="marble-bench-") as root:
            found = measure(make, shape, Path(root))
        print(
            f"| {name} | {found.write:.2f} | {found.space:.2f}{' (' if found.parts else ''}"
            f"{', '.join(f'{part} {share:.2f}' for part, share in found.parts.items())}{')' if found.parts else ''} | "
            f"{found.blocks_read:.2f} | {found.bytes_read / 1024:.1f} |",
            flush=True,
        )
