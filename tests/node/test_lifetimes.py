"""Readers, results, tables and databases given up in any order, on any thread, at the end of the process or in a forked child.

Whoever still holds something gets what it stands for, or a clean error; nothing dies of it. Run under AddressSanitizer as well
(docs/testing.md).
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import marble
from marble.errors import MarbleError

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("text", pa.string())])
KEYS = 600
DEADLINE_S = 60.0
FRESH_SEED = int(os.environ.get("MARBLE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")

Model = dict[int, str]


def rows(model: Model) -> list[tuple[int, str]]:
    return sorted(model.items())


class Held:
    """Something that reads one state of a table, and what it is to give."""

    def __init__(self, thing: Any, expected: list[tuple[int, str]]) -> None:
        self.thing = thing
        self.expected = expected
        self.seen = 0

    def step(self, most: int) -> bool:
        """Read on. False at the end."""
        for _ in range(most):
            batch = next(self.thing, None)
            if batch is None:
                assert self.seen == len(self.expected)
                return False
            found = list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
            assert found == self.expected[self.seen : self.seen + len(found)]
            self.seen += len(found)
        return True


class Result(Held):
    """Rows that were read: they stay, whatever becomes of where they came from."""

    def step(self, most: int) -> bool:
        assert list(zip(*(column.to_pylist() for column in self.thing.columns), strict=True)) == self.expected
        return True


class World:
    """A database, what it must hold, and what was taken of it."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.directory = directory
        self.chance = chance
        self.model: Model = {}
        self.local: Model = {}
        self.held: list[Held] = []
        self.others: list[Any] = []
        self.open()

    def open(self) -> None:
        self.db: Any = marble.open(self.directory, snapshot_distance=3, retention=5)
        self.table: Any = self.db.create_table("t", SCHEMA, key=["id"], compression="lz4", exist_ok=True)
        self.own: Any = self.db.create_table("own", SCHEMA, key=["id"], replicated=False, exist_ok=True)

    def write(self) -> None:
        first = self.chance.randrange(KEYS)
        keys = range(first, min(KEYS, first + self.chance.randrange(1, 200)))
        text = chr(97 + self.chance.randrange(26)) * self.chance.randrange(1, 400)
        for table, model in ((self.table, self.model), (self.own, self.local)):
            table.write(pa.record_batch({"id": list(keys), "text": [text] * len(keys)}, schema=SCHEMA))
            model.update(dict.fromkeys(keys, text))

    def delete(self) -> None:
        first = self.chance.randrange(KEYS)
        self.table.delete_range(between=(first, first + 50))
        for key in range(first, first + 51):
            self.model.pop(key, None)

    def scan(self) -> None:
        table, model = self.chance.choice(((self.table, self.model), (self.own, self.local)))
        low = self.chance.randrange(KEYS)
        backwards = self.chance.random() < 0.3
        scan = table.scan(filter=pc.field("id") >= low, reverse=backwards)
        expected = [row for row in rows(model) if row[0] >= low]
        self.held.append(Held(iter(scan.to_reader()), expected[::-1] if backwards else expected))
        if self.chance.random() < 0.3:
            self.others.append(scan)

    def get(self) -> None:
        keys = [key for key in self.chance.sample(range(KEYS), 20) if key in self.model]
        if keys:
            self.held.append(Result(self.table.get_many(keys), [(key, self.model[key]) for key in keys]))

    def export(self) -> None:
        """Somebody else's reader over the C interface."""
        self.held.append(Held(iter(pa.RecordBatchReader.from_stream(self.table.scan())), rows(self.model)))

    def step(self) -> None:
        if self.held:
            held = self.chance.choice(self.held)
            if not held.step(self.chance.randrange(1, 3)):
                self.held.remove(held)

    def give_up(self) -> None:
        """Close, forget, or hand to another thread to forget."""
        if not self.held:
            return
        held = self.held.pop(self.chance.randrange(len(self.held)))
        how = self.chance.randrange(3)
        if how == 0 and isinstance(held.thing, pa.RecordBatchReader):
            held.thing.close()
        elif how == 1:
            things = [held]
            thread = threading.Thread(target=lambda: (things[0].step(1), things.clear()))
            thread.start()
            del held
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def cycle(self) -> None:
        """Something that only the collector finds."""
        if self.held:
            ring: list[Any] = [self.held.pop(0), self.db, self.table]
            ring.append(ring)

    def collect(self) -> None:
        gc.collect()

    def close(self) -> None:
        """Others go on with what they have; what is asked of the database fails cleanly."""
        self.others += [self.db, self.table, self.own]
        self.db.close()
        for call in (self.table.count_rows, lambda: self.table.get(1), self.db.tables, self.write_again):
            with pytest.raises(MarbleError):
                call()
        for held in list(self.held)[: self.chance.randrange(5)]:
            held.step(1)
        if self.chance.random() < 0.5:
            del self.db, self.table, self.own
            self.others.clear()
        self.open()

    def write_again(self) -> None:
        self.others[-2].write(pa.record_batch({"id": [1], "text": ["x"]}, schema=SCHEMA))

    def finish(self) -> None:
        for held in self.held:
            while held.step(1) and not isinstance(held, Result):
                pass
        assert [tuple(row.values()) for row in self.table.scan().to_table().to_pylist()] == rows(self.model)
        order: list[Callable[[], None]] = [self.db.close, self.held.clear, self.others.clear, gc.collect]  # type: ignore[list-item]
        self.chance.shuffle(order)
        for each in order:
            each()


ACTIONS = ("write", "write", "write", "delete", "scan", "scan", "get", "export", "step", "step", "step", "give_up", "cycle",
           "collect", "close")  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("offset", range(5))
def test_given_up_in_any_order(offset: int, tmp_path: Path) -> None:
    print(f"repeat with MARBLE_TEST_SEED={FRESH_SEED}")
    world = World(tmp_path, random.Random(FRESH_SEED + offset))
    for _ in range(90):
        getattr(world, world.chance.choice(ACTIONS))()
    world.finish()


def test_read_and_closed_by_many_threads(tmp_path: Path) -> None:
    """A database is closed while others read, write, and open and give up readers."""
    world = World(tmp_path, random.Random(7))
    for _ in range(6):
        world.write()
    before, errors, going = rows(world.model), [], threading.Barrier(5)
    table = world.table

    def work(seed: int) -> None:
        chance = random.Random(seed)
        going.wait(DEADLINE_S)
        try:
            while True:
                reader = Held(iter(table.scan().to_reader()), before)
                while reader.step(1) and chance.random() < 0.8:
                    pass
                table.get_many([key for key, _ in before[:50]])
        except MarbleError:
            pass  # It was closed.
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    going.wait(DEADLINE_S)
    for _ in range(5):
        assert table.count_rows(consistency="local") == len(before)
    world.db.close()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert errors == []


BEGINNING = """
import gc, os, sys, threading
import pyarrow as pa
import marble
from marble.errors import MarbleError, UsageError
schema = pa.schema([pa.field("id", pa.int64()), pa.field("text", pa.string())])
db = marble.open(sys.argv[1], snapshot_distance=2)
table = db.create_table("t", schema, key=["id"])
for i in range(8):
    table.write(pa.record_batch({"id": range(i * 100, i * 100 + 3000), "text": ["x" * 100] * 3000}, schema=schema))
reader = table.scan().to_reader()
reader.read_next_batch()
fresh = table.scan().to_reader()
local = db.create_table("own", schema, key=["id"], replicated=False)
"""

ENDS = {
    "everything is open": "",
    "the database is closed, the reader is not": "db.close()",
    "the database is gone, the reader is not": "db.close(); del db, table, local; gc.collect()",
    "in a cycle": "ring = [db, reader, table]; ring.append(ring); del db, reader, table, local",
    "in a module that goes late": "sys.db, sys.reader = db, reader",
    "read at exit": "import atexit; atexit.register(reader.read_all)",
    "by an exception in a daemon thread's time": """
# Not a scan: pyarrow's reader calls Python back, and CPython ends a thread that wants the GIL by unwinding it through that call,
# where pyarrow aborts (docs/tables.md).
def forever():
    while True:
        try:
            table.count_rows()
            table.get_many([7, 8])
        except MarbleError:
            return
threading.Thread(target=forever, daemon=True).start()
""",
    "by sys.exit in a callback": """
table.write_async(pa.record_batch({"id": [1], "text": ["y"]}, schema=schema))
sys.exit(0)
""",
    "in a forked child": """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
if child == 0:
    try:
        table.write(pa.record_batch({"id": [1], "text": ["y"]}, schema=schema))
    except UsageError as error:
        assert "fork" in str(error), error
    else:
        os._exit(3)
    # What was read is memory like any other.
    assert sum(batch.num_rows for batch in fresh) == 3700
    del reader, fresh, table, local
    gc.collect()
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
table.write(pa.record_batch({"id": [1], "text": ["y"]}, schema=schema))
assert table.get(1)["text"] == "y"
db.close()
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_with_things_open(end: str, tmp_path: Path) -> None:
    script = BEGINNING + ENDS[end]
    done = subprocess.run(
        [sys.executable, "-P", "-X", "faulthandler", "-c", script, str(tmp_path)],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    with marble.open(tmp_path) as db:
        assert db.table("t").count_rows() == 3700
