"""marble, RocksDB and LMDB behind one face, so that the same work is measured with the same data.

What each is given and gives back: the peers take and return `bytes`, one by one or in lists, since that is what they have.
marble is measured twice: ``Form.ARROW`` takes and returns Arrow batches, as its users do, and ``Form.BYTES`` takes lists of
`bytes` and makes lists of `bytes` of the result, so that each measures the same from end to end.

Each peer is used as its documentation advises: RocksDB by `WriteBatch`, multi-get, iterators with bounds and readahead,
raw bytes, bloom filters and a block cache of the same size; LMDB by `putmulti`, `getmulti` and cursors. Nobody compresses.
"""

from __future__ import annotations

import enum
import importlib.util
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from work import SCHEMA, Keys, Layout, Pair, Shape, Store, arrow

from marble._core.sstable import BlockCache
from marble.database import Database
from marble.env import SystemFiles
from marble.local import LocalBackend
from marble.lsm.compaction import CompactionPolicy
from marble.lsm.files import CACHE_BYTES_MAX, TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.store import StorePolicy
from marble.node import GROUP, Node
from marble.options import NodeOptions

NEVER: Final = 1 << 40
"""Files, bytes or entries that no benchmark reaches."""


class Form(enum.Enum):
    """What marble is given and gives back."""

    ARROW = "Arrow"
    BYTES = "bytes"


class Marble:
    """marble in this process, as `marble.open` makes it; `layout` decides about caches and compaction.

    Without a layout everything is as `marble.open` has it.
    """

    def __init__(self, path: Path, shape: Shape, layout: Layout | None, form: Form = Form.ARROW) -> None:
        self.form = form
        self.name = f"marble, {form.value}"
        files = SystemFiles(path)
        options = NodeOptions(cluster_id="embedded", node_id=1, endpoints={1: "embedded"})
        self.cache = BlockCache(CACHE_BYTES_MAX if layout is None else layout.cache_bytes(shape))
        if layout is None:
            machine = TableMachine(files=TableFiles(files, cache=self.cache))
        else:
            policy = StorePolicy(CompactionPolicy(NEVER, NEVER, level0_overlap_files=NEVER))
            machine = TableMachine(files=TableFiles(files, cache=self.cache), policy=policy)
            options = NodeOptions(
                cluster_id="embedded",
                node_id=1,
                endpoints={1: "embedded"},
                snapshot_distance=NEVER,
                snapshot_log_bytes=NEVER,
                memory_bytes_max=NEVER,
                backlog_bytes_max=NEVER,
            )
        self.machine = machine
        self.node = Node(options, files, {GROUP: machine})
        self.node.start()
        self.database = Database(LocalBackend(self.node, machine))
        self.table = self.database.create_table("t", SCHEMA, ["k"], exist_ok=True)

    def other(self, form: Form) -> Marble:
        """The same store in another form."""
        twin = object.__new__(Marble)
        twin.__dict__.update(self.__dict__, form=form, name=f"marble, {form.value}")
        return twin

    def write(self, shape: Shape, first: int, end: int, *, sync: bool) -> None:
        made = (arrow(batch) for batch in shape.batches[first:end])
        source = iter(shape.arrow_batches[first:end]) if self.form is Form.ARROW else made
        if sync:
            for batch in source:
                self.table.write(batch)
        else:
            self._pipeline(source)

    def put(self, singles: Sequence[tuple[Pair, pa.RecordBatch]], *, sync: bool) -> None:
        source = (batch if self.form is Form.ARROW else arrow([pair]) for pair, batch in singles)
        if sync:
            for batch in source:
                self.table.write(batch)
        else:
            self._pipeline(source)

    def _pipeline(self, source: Iterator[pa.RecordBatch]) -> None:
        waiting: deque[Future[int]] = deque()
        for batch in source:
            if len(waiting) == 256:
                waiting.popleft().result()
            waiting.append(self.table.write_async(batch))
        while waiting:
            waiting.popleft().result()

    def flush(self) -> None:
        self.node.snapshot().result()

    def get(self, keys: Sequence[bytes]) -> None:
        get = self.table.get
        for key in keys:
            get(key)

    def get_many(self, keys: Keys) -> int:
        if self.form is Form.ARROW:
            rows = self.table.get_many(keys.arrow)
            return int(rows.num_rows - rows.column("k").null_count)
        values = self.table.get_many(keys.listed).column("v").to_pylist()
        return len(values) - values.count(None)

    def scan(self) -> int:
        return self._read(self.table.scan())

    def prefix(self, prefix: bytes) -> int:
        return self._read(self.table.scan(filter=pc.starts_with(pc.field("k"), prefix)))

    def between(self, first: bytes, last: bytes) -> int:
        return self._read(self.table.scan(between=(first, last)))

    def delete_range(self, first: bytes, last: bytes) -> None:
        """With a sync, as every write of marble has one."""
        self.table.delete_range(between=(first, last))

    def _read(self, scan: Any) -> int:
        if self.form is Form.ARROW:
            return int(scan.to_table().num_rows)
        rows: list[Pair] = []
        for batch in scan:
            rows += zip(*(column.to_pylist() for column in batch.columns), strict=True)
        return len(rows)

    def close(self) -> None:
        self.database.close()


class Rocks:
    """RocksDB by rocksdict."""

    name = "rocksdict"

    def __init__(self, path: Path, shape: Shape, layout: Layout | None) -> None:
        import rocksdict

        self._module = rocksdict
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        if layout is not None and layout.counted:
            options.enable_statistics()
        options.set_compression_type(rocksdict.DBCompressionType.none())
        blocks = rocksdict.BlockBasedOptions()
        blocks.set_bloom_filter(10, False)
        blocks.set_block_cache(rocksdict.Cache(64 << 20 if layout is None else layout.cache_bytes(shape)))
        options.set_block_based_table_factory(blocks)
        if layout is not None:
            options.set_disable_auto_compactions(True)
            options.set_write_buffer_size(4 << 30)
            options.set_level_zero_slowdown_writes_trigger(1 << 20)
            options.set_level_zero_stop_writes_trigger(1 << 20)
            options.set_target_file_size_base(1 << 40)
        self._options = options
        self.database = rocksdict.Rdict(str(path), options)
        self._sync, self._no_sync = rocksdict.WriteOptions(), rocksdict.WriteOptions()
        self._sync.sync = True

    def write(self, shape: Shape, first: int, end: int, *, sync: bool) -> None:
        options = self._sync if sync else self._no_sync
        for batch in shape.batches[first:end]:
            writes = self._module.WriteBatch(raw_mode=True)
            put = writes.put
            for key, value in batch:
                put(key, value)
            self.database.write(writes, options)

    def put(self, singles: Sequence[tuple[Pair, pa.RecordBatch]], *, sync: bool) -> None:
        options, put = self._sync if sync else self._no_sync, self.database.put
        for (key, value), _ in singles:
            put(key, value, options)

    def flush(self) -> None:
        self.database.flush()

    def get(self, keys: Sequence[bytes]) -> None:
        get = self.database.get
        for key in keys:
            get(key)

    def get_many(self, keys: Keys) -> int:
        values = self.database.get(keys.listed)
        return len(values) - values.count(None)

    def scan(self) -> int:
        return len(list(self.database.items(read_opt=self._read_options())))

    def prefix(self, prefix: bytes) -> int:
        return self._range(prefix, prefix[:-1] + bytes([prefix[-1] + 1]))

    def between(self, first: bytes, last: bytes) -> int:
        return self._range(first, last + b"\0")

    def delete_range(self, first: bytes, last: bytes) -> None:
        self.database.delete_range(first, last + b"\0", self._sync)

    def _range(self, lower: bytes, upper: bytes) -> int:
        options = self._read_options()
        options.set_iterate_upper_bound(upper)
        return len(list(self.database.items(from_key=lower, read_opt=options)))

    def _read_options(self) -> Any:
        options = self._module.ReadOptions()
        options.set_readahead_size(2 << 20)
        return options

    def statistics(self) -> str:
        return str(self._options.get_statistics())

    def close(self) -> None:
        self.database.close()


class Lmdb:
    """LMDB: one B+tree, whatever the layout. Without syncs the whole environment is opened so."""

    name = "lmdb"

    def __init__(self, path: Path, shape: Shape, layout: Layout | None) -> None:
        import lmdb

        self._open: Callable[[bool], Any] = lambda sync: lmdb.open(str(path), map_size=1 << 34, sync=sync)
        self._syncs = True
        self._environment = self._open(True)

    def _env(self, sync: bool) -> Any:
        if sync != self._syncs:
            self._environment.close()
            self._environment, self._syncs = self._open(sync), sync
        return self._environment

    def write(self, shape: Shape, first: int, end: int, *, sync: bool) -> None:
        environment = self._env(sync)
        for batch in shape.batches[first:end]:
            with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                cursor.putmulti(batch)

    def put(self, singles: Sequence[tuple[Pair, pa.RecordBatch]], *, sync: bool) -> None:
        environment = self._env(sync)
        for (key, value), _ in singles:
            with environment.begin(write=True) as transaction:
                transaction.put(key, value)

    def flush(self) -> None:
        self._environment.sync(True)

    def get(self, keys: Sequence[bytes]) -> None:
        begin = self._environment.begin
        for key in keys:
            with begin() as transaction:
                transaction.get(key)

    def get_many(self, keys: Keys) -> int:
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            return len(cursor.getmulti(keys.listed))

    def scan(self) -> int:
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            return len(list(cursor.iternext()))

    def prefix(self, prefix: bytes) -> int:
        return self._range(prefix, prefix + b"\xff")

    def between(self, first: bytes, last: bytes) -> int:
        return self._range(first, last)

    def _range(self, lower: bytes, last: bytes) -> int:
        rows: list[Pair] = []
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            if cursor.set_range(lower):
                for row in cursor.iternext():
                    if row[0] > last:
                        break
                    rows.append(row)
        return len(rows)

    def stat(self) -> dict[str, int]:
        return dict(self._environment.stat())

    def close(self) -> None:
        self._environment.close()


PEERS: Final[dict[str, Callable[[Path, Shape, Layout | None], Store]]] = {
    "marble": Marble,
    "rocksdict": Rocks,
    "lmdb": Lmdb,
}


def installed() -> dict[str, Callable[[Path, Shape, Layout | None], Store]]:
    """Those of `PEERS` that are on this machine."""
    return {name: make for name, make in PEERS.items() if importlib.util.find_spec(name) is not None}


def load(store: Store, shape: Shape, layout: Layout) -> None:
    """Bring all of `shape` into `store`, laid out as `layout` says. The runs of 8 overlap in all of their keys."""
    parts = max(1, layout.runs)
    count = len(shape.batches)
    for part in range(parts):
        store.write(shape, part * count // parts, (part + 1) * count // parts, sync=False)
        if layout.runs:
            store.flush()
