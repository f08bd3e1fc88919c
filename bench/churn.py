"""Does anything leak? Writes, deletes, reads, flushes, compacts and reopens for as long as it is told, and watches what the process holds.

::

    python -P bench/churn.py --minutes 60 --directory /var/tmp/churn

Two databases of bounded size take the same load: one stays open all the time, the other is closed and opened anew in each round.
After each round one sample is taken: resident memory, bytes that Arrow holds, open files, mappings of table files, threads.
At the end the slope of each over the samples behind the warm-up (the first tenth) is compared with what is allowed for an hour, if there
are enough of them; and when both are closed nothing may be left. It ends with 1 if one is steeper, or something is.

Rule 1: the load is the same in every round, so whatever grows with the rounds is kept by mistake.
Rule 2: the slope is the median of the slopes between all pairs of samples (Theil and Sen): one round that was caught in a compaction
does not move it.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

import marble
from marble import Database, Table

KEYS: Final = 40_000
"""So many keys there are: what is alive stays bounded, however long it runs."""
BATCH_ROWS: Final = 500
WRITES: Final = 60
"""Batches written in one round, to each database."""
SNAPSHOT_DISTANCE: Final = 40
"""Entries between two flushes: every round has several, and so compactions, too."""
RETENTION: Final = 30
SETTLED_ROUNDS: Final = 50
"""Fewer behind the warm-up tell nothing of a slope: memtables fill over some ten rounds, then they are flushed at once."""

SCHEMA: Final = pa.schema(
    [
        pa.field("id", pa.int64()),
        pa.field("part", pa.string()),
        pa.field("n", pa.int64()),
        pa.field("text", pa.string()),
    ]
)
SUMS: Final = pa.schema([pa.field("id", pa.int64()), pa.field("total", pa.int64()), pa.field("at", pa.timestamp("us"))])


@dataclass(frozen=True, slots=True)
class Sample:
    """What the process held after a round. ``seconds`` since the first."""

    seconds: float
    rss_bytes: int
    arrow_bytes: int
    files: int
    mappings: int
    threads: int


ALLOWED_AN_HOUR: Final = {
    "rss_bytes": 16 * 1024 * 1024,
    "arrow_bytes": 4 * 1024 * 1024,
    "files": 1,
    "mappings": 4,
    "threads": 0.5,
}
"""Slopes, each in its unit. What is below is noise: allocators settle, and a round ends with some more or fewer files."""

LEFT_BYTES_MAX: Final = 64 * 1024
"""Of Arrow's memory, when all is closed: what is cached for the process, such as empty buffers."""


def sample(began: float) -> Sample:
    """What the process holds now."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = sum(line.rstrip().endswith(".arrow") for line in maps)
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return Sample(
        round(time.monotonic() - began, 3),
        pages * os.sysconf("SC_PAGE_SIZE"),
        pa.total_allocated_bytes(),
        len(os.listdir("/proc/self/fd")),
        mappings,
        threading.active_count(),
    )


def rows(chance: random.Random) -> pa.RecordBatch:
    """Some rows anywhere among the keys."""
    ids = [chance.randrange(KEYS) for _ in range(BATCH_ROWS)]
    text = "x" * chance.randrange(10, 200)
    return pa.record_batch(
        [ids, [f"p{i % 16}" for i in ids], [chance.randrange(1000) for _ in ids], [text] * len(ids)], SCHEMA
    )


def opened(directory: Path) -> tuple[Database, Table, Table, Table]:
    """A database with its tables: plain, with merge operators and a time to live, and local."""
    db = marble.open(directory, snapshot_distance=SNAPSHOT_DISTANCE, retention=RETENTION)
    plain = db.create_table("plain", SCHEMA, key=["part", "id"], compression="lz4", exist_ok=True)
    sums = db.create_table(
        "sums", SUMS, key=["id"], merge={"total": "sum"}, ttl=20, ttl_column="at", ttl_stamped=True, exist_ok=True
    )
    local = db.create_table("local", SCHEMA, key=["id"], replicated=False, exist_ok=True)
    return db, plain, sums, local


def load(tables: tuple[Database, Table, Table, Table], chance: random.Random, writes: int = WRITES) -> None:
    """One round: writes of all kinds, and reads of all kinds, some of them given up half way."""
    db, plain, sums, local = tables
    kept = []
    for number in range(writes):
        batch = rows(chance)
        index = plain.write(batch)
        local.write(batch)
        with db.transaction() as changes:
            changes.write("sums", pa.record_batch({"id": batch["id"], "total": batch["n"]}))
            changes.delete("plain", [(f"p{i % 16}", i) for i in (chance.randrange(KEYS) for _ in range(50))])
        first = chance.randrange(KEYS)
        local.delete_range(between=(first, first + KEYS // 20))
        if number % 10 == 0:
            plain.delete_range(prefix=f"p{chance.randrange(16)}")
        plain.get_many([(f"p{i % 16}", i) for i in batch["id"].to_pylist()[:200]])
        plain.get((batch["part"][0].as_py(), batch["id"][0].as_py()), at_index=index)
        sums.get_many(batch.select(["id"]))
        reader = plain.scan(["id", "n"], pc.field("n") < 100, reverse=number % 2 == 0, at_index=index).to_reader()
        if number % 4:
            # Given up half way; some are never closed, and go with the list.
            next(iter(reader), None)
            kept.append(reader)
        else:
            reader.read_all()
        sums.scan(between=(first, first + 500), limit=100).to_table()
    local.scan(prefix=first).to_table()
    assert plain.scan().count_rows() <= KEYS


def churn(directory: Path, seconds: float, seed: int, tell: bool, writes: int = WRITES) -> list[Sample]:
    """Rounds until `seconds` have passed, at least two; the samples behind each, between one before all and one when all is closed."""
    chance = random.Random(seed)
    began = time.monotonic()
    samples = [sample(began)]
    lasting = opened(directory / "lasting")
    while len(samples) < 3 or time.monotonic() - began < seconds:
        load(lasting, chance, writes)
        reopened = opened(directory / "reopened")
        load(reopened, chance, writes)
        reopened[0].close()
        del reopened
        samples.append(sample(began))
        if tell:
            print(asdict(samples[-1]), flush=True)
    lasting[0].close()
    del lasting
    return [*samples, sample(began)]


def left(samples: list[Sample]) -> list[str]:
    """What is there when all is closed and was not before."""
    before, after = samples[0], samples[-1]
    kept = [f"{name}: {getattr(after, name)} of {getattr(before, name)} before" for name in ("files", "mappings", "threads")
            if getattr(after, name) > getattr(before, name)]  # fmt: skip
    more = after.arrow_bytes - before.arrow_bytes
    return [*kept, f"{more:,} bytes of Arrow's"] if more > LEFT_BYTES_MAX else kept


def slope(samples: list[Sample], name: str) -> float:
    """By how much the figure `name` grows in an hour."""
    points = [(each.seconds, getattr(each, name)) for each in samples]
    return 3600.0 * float(median((b - a) / (after - before) for (before, a), (after, b) in combinations(points, 2)))


def main(arguments: list[str] | None = None) -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--directory", type=Path, help="where the databases go; must be empty. Default: a temporary one"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        samples = churn(options.directory or Path(temporary), options.minutes * 60, options.seed, tell=True)
    kept = left(samples)
    print(f"left when all is closed: {'; '.join(kept) or 'nothing'}")
    rounds = samples[1:-1]
    settled = rounds[len(rounds) // 10 :]
    print(f"{len(rounds)} rounds in {rounds[-1].seconds / 60:.1f} minutes")
    if len(settled) < SETTLED_ROUNDS:
        print("too few to tell anything about slopes")
        return 1 if kept else 0
    good = not kept
    for name in (each.name for each in fields(Sample) if each.name != "seconds"):
        first, last, most = (
            getattr(settled[0], name),
            getattr(settled[-1], name),
            max(getattr(s, name) for s in settled),
        )
        steep = slope(settled, name)
        bound = ALLOWED_AN_HOUR[name]
        good &= steep <= bound
        words = "holds" if steep <= bound else "LEAKS"
        print(
            f"{name:<12} {first:>14,} to {last:>14,}, most {most:>14,}: {steep:+,.1f} an hour of {bound:,} allowed: {words}"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
