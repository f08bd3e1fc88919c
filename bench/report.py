"""marble beside RocksDB and LMDB, in one run: ``python bench/report.py``. See ``peers.py`` for what is compared.

Rounds of the stores take turns, and the best of each counts: what else runs on the machine disturbs all of them alike. A
ratio is how many times as fast marble is. An asterisk stands at what misses its target.

No turn pays for another one. Before each, the disk has everything that was written; no file is removed between turns, since
a file system that is mounted with ``discard`` tells the disk of removed blocks in the background, for seconds; what the turn
before has freed is sorted (`sort_freed`); and the memory that a turn of writes takes anew is backed by the machine (`back_memory`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import peers
from amplification import amplification_report
from peers import PEERS, Form, Marble, installed
from reopened import OPENED, reopened
from work import LAYOUTS, READS, WRITES, Layout, Shape, Store

MARBLES = ("marble, Arrow", "marble, bytes")


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    started = clock()
    result = run()
    return clock() - started, result


MEMORY_SHARE: Final = 6
"""How many times its data a store may take of memory in a turn: for its own copies, and for the pages of its files."""
MEMORY_BYTES_MAX: Final = 1 << 30


def settle(shape: Shape) -> None:
    """Let no store pay for what the one before it has left: dirty pages, garbage, memory that was given back."""
    os.sync()
    gc.collect()
    gc.freeze()
    sort_freed()
    back_memory(min(MEMORY_SHARE * shape.nbytes, MEMORY_BYTES_MAX))


SORTED_BLOCKS: Final = 32
"""So many times 10,000 blocks are sorted."""
SORTED_BYTES: Final = 100_000
"""More than what malloc has at hand, less than what it asks the system for."""


def sort_freed() -> None:
    """Have malloc sort the blocks that were freed.

    glibc's does so when it is asked for a block that it has not at hand, up to 10,000 of them for a block. So after one store has
    handed out 100,000 values, and they are gone, the next one that needs memory waits 3 ms, were it for 32 bytes.
    """
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    for _ in range(SORTED_BLOCKS):
        library.free(library.malloc(SORTED_BYTES))


def back_memory(nbytes: int) -> None:
    """Touch so much memory and give it back, so that who takes it next gets it from this system and not from its host.

    A virtual machine whose free memory goes back to its host (free page reporting) waits for the host at the next first touch: 5
    ms for 2 MiB were seen. It reports whole free blocks of 2 MiB, so it is those that take memory in large pages who wait, as
    Arrow's allocator does and RocksDB's does not, and the more the longer the turn before has rested.
    """
    # Private, since shared memory comes in small pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with contextlib.closing(mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=flags)) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # A system without large pages.
                memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1


@contextlib.contextmanager
def directories(base: Path | None) -> Iterator[Callable[[], Path]]:
    """Makes new directories, all of which go at the end."""
    with tempfile.TemporaryDirectory(dir=base, prefix="marble-bench-") as root:
        count = iter(range(1 << 30))

        def make() -> Path:
            path = Path(root) / str(next(count))
            path.mkdir()
            return path

        yield make


def writes(shape: Shape, base: Path | None, rounds: int) -> list[tuple[str, dict[str, float], float | None]]:
    """For each way to write: seconds a row of each store."""
    lines = []
    _ = shape.batches, shape.arrow_batches, shape.singles  # Nobody's turn is to make the data.
    turns = [(form, make) for name, make in installed().items() for form in forms(name)]
    for write in WRITES:
        best: dict[str, float] = {}
        with directories(base) as directory:
            for number in range(rounds):
                # There and back, so that nobody always follows the same one.
                for form, make in turns if number % 2 == 0 else reversed(turns):
                    store = make(directory(), shape, None)
                    if isinstance(store, Marble) and form is not None:
                        store = store.other(form)
                    try:
                        settle(shape)
                        took, rows = seconds(lambda store=store, write=write: write.run(store, shape))
                    finally:
                        store.close()
                    best[store.name] = min(best.get(store.name, 1e9), took / rows)
        lines.append((write.name, best, write.target))
    return lines


def forms(peer: str) -> tuple[Form | None, ...]:
    return (Form.ARROW, Form.BYTES) if peer == "marble" else (None,)


def stores(shape: Shape, layout: Layout, directory: Callable[[], Path]) -> list[Store]:
    """All stores with the data in them."""
    opened: list[Store] = []
    for make in installed().values():
        store = make(directory(), shape, layout)
        peers.load(store, shape, layout)
        opened.append(store)
        if isinstance(store, Marble):
            opened.append(store.other(Form.BYTES))
    return opened


def reads(
    shape: Shape, layout: Layout, base: Path | None, rounds: int, clock: Callable[[], float]
) -> list[tuple[str, dict[str, float], float | None]]:
    lines: list[tuple[str, dict[str, float], float | None]] = []
    with directories(base) as directory:
        opened = stores(shape, layout, directory)
        try:
            for read in READS:
                best: dict[str, float] = {}
                for number in range(rounds + 1):
                    picked = read.pick(shape, number)
                    counts = set()
                    for store in opened:
                        if read.name == "get" and store.name == MARBLES[1]:
                            continue  # It is the same as the other.
                        gc.collect()
                        sort_freed()
                        asked = picked
                        if store.name == MARBLES[1] and read.name.startswith("get_many"):
                            asked = read.pick(shape, number + 1000)  # Those of the other form are in the caches by now.
                        took, rows = seconds(lambda store=store, asked=asked, read=read: read.run(store, asked), clock)
                        counts.add(rows)
                        if number:  # The first round warms the caches up.
                            best[store.name] = min(best.get(store.name, 1e9), took / rows)
                    if len(counts) != 1:
                        raise SystemExit(f"{layout.name}, {read.name}: the stores do not agree: {counts} rows")
                best.setdefault(MARBLES[1], best[MARBLES[0]])
                lines.append((read.name, best, read.target))
        finally:
            for store in opened:
                if store.name != MARBLES[1]:
                    store.close()
    return lines


def show(title: str, lines: list[tuple[str, dict[str, float], float | None]]) -> None:
    """A table of nanoseconds a row and of ratios."""
    names = [name for name in (*MARBLES, "rocksdict", "lmdb") if any(name in best for _, best, _ in lines)]
    print(f"\n### {title}\n")
    ratios = [f"{form}:{peer}" for peer in names if peer not in MARBLES for form in ("Arrow", "bytes")]
    print("| ns a row | " + " | ".join(names) + " | " + " | ".join(ratios) + " | at least |")
    print("|---|" + "---:|" * (len(names) + len(ratios) + 1))
    for what, best, target in lines:
        cells = [f"{best[name] * 1e9:,.0f}" for name in names]
        for peer in names:
            if peer in MARBLES:
                continue
            for marble in MARBLES:
                ratio = best[peer] / best[marble]
                missed = target is not None and peer == "rocksdict" and ratio < target
                cells.append(f"{ratio:.2f}{' *' if missed else ''}")
        print(f"| {what} | " + " | ".join(cells) + f" | {'' if target is None else target} |", flush=True)


def machine() -> str:
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of 24 B keys and 100 B (default: 1 million)")
    parser.add_argument("--large-rows", type=int, default=100_000, help="of 16 B keys and 512 B (default: 100,000)")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement; the best counts")
    parser.add_argument("--only", default="", help="parts whose title has this: writes, reads, memtable, 8 runs, ...")
    parser.add_argument(
        "--directory", type=Path, help="where the stores are (default: the system's for temporary files)"
    )
    parser.add_argument(
        "--processor",
        action="store_true",
        help="measure reads by the processor's time of the thread that reads, where other programs run beside",
    )
    given = parser.parse_args()
    clock = time.thread_time if given.processor else time.perf_counter
    print(machine())
    for missing in PEERS.keys() - installed().keys():
        print(f"{missing} is not installed and is left out: pip install 'marbledb[bench]'")
    for shape in (Shape(given.rows), Shape(given.large_rows, 16, 512)):
        if not shape.rows:
            continue
        what = f"{shape.rows:,} rows of {shape.key_bytes} B and {shape.value_bytes} B"
        if given.only in (title := f"writes: {what}"):
            show(title, writes(shape, given.directory, given.rounds))
        for layout in LAYOUTS:
            if given.only in (title := f"reads, {layout.name}: {what}"):
                show(title, reads(shape, layout, given.directory, given.rounds, clock))
        if given.only in (title := f"reads, {OPENED.name}: {what}"):
            with directories(given.directory) as directory:
                show(title, reopened(shape, directory, given.rounds, lambda run: seconds(run, clock)[0]))
        if given.only in (title := f"amplification: {what}, written 10 times more"):
            print(f"\n### {title}\n")
            amplification_report(shape, given.directory)


if __name__ == "__main__":
    main()
