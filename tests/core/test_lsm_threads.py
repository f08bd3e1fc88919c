"""Readers in many threads beside a table that is written, flushed and compacted: each sees its own moment."""

from __future__ import annotations

import random
import threading

import pyarrow as pa
from core.test_memtable_scan import TABLES
from reference.lsm import Tree
from reference.memtable import rows_of

from marble._core.lsm import Reader

Moment = tuple[Reader, list[dict[str, object]]]


def test_readers_beside_a_writer_see_their_own_moment() -> None:
    schema, key, make_row = TABLES["text_and_number"]
    tree = Tree(schema, key, random.Random(5))
    moments: list[Moment] = [(tree.reader(), [])]
    faults: list[str] = []
    finished = threading.Event()

    def read(seed: int) -> None:
        chance = random.Random(seed)
        rounds = 0
        while not finished.is_set() or rounds < 20:
            rounds += 1
            reader, expected = moments[-1]
            if rows_of(reader, batch_rows_max=chance.choice([5, 65536])) != expected:
                faults.append("scan")
            if rows_of(reader, reverse=True, limit=9) != expected[::-1][:9]:
                faults.append("reverse")
            asked = pa.RecordBatch.from_pylist([row for row in expected if chance.random() < 0.3], schema)
            if reader.get_many(asked.select(key))[0].to_pylist() != asked.to_pylist():
                faults.append("get_many")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(150):
        tree.step(make_row)
        moments.append((tree.reader(), tree.rows.scan()))
    finished.set()
    for thread in threads:
        thread.join()
    assert faults == []


def test_threads_share_a_scan_and_one_may_close_it() -> None:
    schema, key, make_row = TABLES["whole"]
    tree = Tree(schema, key, random.Random(6))
    for _ in range(60):
        tree.step(make_row)
    for closing in (False, True):
        scan = tree.reader().scan(2)
        taken: list[list[int]] = [[], [], []]

        def take(into: list[int], scan: object = scan) -> None:
            for batch in scan:
                into += batch["k"].to_pylist()

        threads = [threading.Thread(target=take, args=(into,)) for into in taken]
        for thread in threads:
            thread.start()
        if closing:
            scan.close()
        for thread in threads:
            thread.join()
        found = [k for into in taken for k in into]
        everything = [row["k"] for row in tree.rows.scan()]
        assert sorted(found) == (everything if not closing else sorted(set(everything[: len(found)])))
        assert all(into == sorted(into) for into in taken)
