"""The slow, obvious twin of marble._core.memtable: a dict from encoded key to row; and small tables to test with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa
from reference import key_codec

INT_SCHEMA = pa.schema([("k", pa.int64()), ("v", pa.int64())])


def ints(keys: Iterable[int], value: int | None = None) -> pa.RecordBatch:
    keys = list(keys)
    return pa.RecordBatch.from_pydict({"k": keys, "v": keys if value is None else [value] * len(keys)}, INT_SCHEMA)


def int_keys(keys: Iterable[int]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(list(keys), pa.int64())], ["k"])


def rows_of(snapshot: object, **options: object) -> list[dict[str, object]]:
    rows = []
    for batch in snapshot.scan(**options):
        batch.validate(full=True)
        assert batch.num_rows > 0
        rows += batch.to_pylist()
    return rows


class Memtable:
    """Rows as Python values, by key."""

    def __init__(self, schema: pa.Schema, key: Sequence[str]) -> None:
        self.schema = schema
        self.key = tuple(key)
        self.rows: dict[bytes, dict[str, object]] = {}
        self.index = 0

    def _keys(self, batch: pa.RecordBatch) -> list[bytes]:
        return key_codec.encode(batch.select(list(self.key)))

    def upsert(self, batch: pa.RecordBatch, index: int) -> int:
        self.rows.update(zip(self._keys(batch), batch.to_pylist(), strict=True))
        self.index = index
        return batch.num_rows

    def delete(self, keys: pa.RecordBatch, index: int) -> int:
        before = len(self.rows)
        for key in self._keys(keys):
            self.rows.pop(key, None)
        self.index = index
        return before - len(self.rows)

    def copy(self) -> Memtable:
        other = Memtable(self.schema, self.key)
        other.rows = dict(self.rows)
        other.index = self.index
        return other

    def get_many(self, keys: pa.RecordBatch) -> list[dict[str, object] | None]:
        return [self.rows.get(key) for key in self._keys(keys)]

    def scan(self) -> list[dict[str, object]]:
        return [self.rows[key] for key in sorted(self.rows)]
