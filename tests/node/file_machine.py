"""A machine whose rows lie in files named by their content: the smallest that shows what transfer and healing do with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import pyarrow as pa

from marble._core.checksum import Xxh3Name
from marble._core.entry_batch import encode_payload
from marble.env import Files
from marble.errors import CorruptionError
from marble.lsm.machine import TableMachine
from marble.lsm.snapshot import TableState
from marble.machine import FILES, FILES_SCHEMA, SNAPSHOT_SCHEMA, FileRef, Pace

ROWS_PER_FILE = 8


def content_name(data: bytes) -> str:
    total = Xxh3Name()
    total.update(data)
    return total.name()


def files_batch(refs: Sequence[FileRef]) -> pa.RecordBatch:
    """A row of section "files" that names `refs`."""
    zeros = {field.name: 0 if pa.types.is_integer(field.type) else b"" for field in FILES_SCHEMA if not field.nullable}
    empty = {field.name: None for field in FILES_SCHEMA if field.nullable}
    rows = [{**empty, **zeros, "name": ref.name, "nbytes": ref.nbytes} for ref in refs]
    payload = encode_payload(pa.RecordBatch.from_pylist(rows, FILES_SCHEMA)).to_pybytes()
    return pa.RecordBatch.from_pylist([{"section": FILES, "table": 0, "payload": payload}], SNAPSHOT_SCHEMA)


class FileState:
    """A `MachineState`: each piece of rows becomes a file, the rest stays in the snapshot."""

    def __init__(self, machine: FileMachine, inner: TableState) -> None:
        self.applied_index = inner.applied_index
        self._machine = machine
        self._inner = inner
        self._refs: list[FileRef] = []

    def batches(self, pace: Pace | None = None) -> Iterator[pa.RecordBatch]:
        kept = []
        for batch in self._inner.batches():
            if batch.column("section")[0].as_py() != "rows":
                kept.append(batch)
                continue
            made = [self._machine.write(part) for part in self._machine.split(batch)]
            self._refs += made
            kept.append(files_batch(made))
        self._machine.disk.sync_directory("tables")
        self._machine.refs = list(self._refs)
        yield from kept

    def files(self) -> Sequence[FileRef]:
        return list(self._refs)


class FileMachine(TableMachine):
    """See the head of this file. Also a `StoredMachine` and a `HealingMachine`."""

    def __init__(self, disk: Files, group: int = 0) -> None:
        super().__init__()
        self.disk = disk
        self.group = group
        self.refs: list[FileRef] = []
        self.bad: list[FileRef] = []
        self.collected = 0

    memory_bytes = 0
    backlog_bytes = 0

    compaction_due = False

    def compact(self, pace: Pace | None = None) -> bool:
        return False

    def path(self, name: str) -> str:
        return f"tables/{self.group:08x}-{name}.arrow"

    def split(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """The rows of a piece in pieces of which most do not change when rows are added."""
        from marble._core.entry_batch import decode_payload
        from marble.lsm.snapshot import _aligned, _piece

        info = self.tables()[0]
        rows = decode_payload(_aligned(batch.column("payload")[0].as_buffer()), info.schema)
        for start in range(0, rows.num_rows, ROWS_PER_FILE):
            yield _piece("rows", info.id, encode_payload(rows.slice(start, ROWS_PER_FILE)))

    def write(self, part: pa.RecordBatch) -> FileRef:
        data = part.serialize().to_pybytes()
        ref = FileRef(content_name(data), len(data))
        self.disk.make_directory("tables")
        if not self.disk.exists(self.path(ref.name)):
            temporary = f"tables/{self.group:08x}-0.tmp"
            if self.disk.exists(temporary):
                self.disk.remove(temporary)
            file = self.disk.create(temporary)
            file.write(data)
            file.sync()
            file.close()
            self.disk.rename(temporary, self.path(ref.name))
        return ref

    def capture(self) -> FileState:  # type: ignore[override]
        return FileState(self, super().capture())

    def restore(self, index: int, batches: Iterable[pa.RecordBatch]) -> None:
        refs: list[FileRef] = []
        super().restore(index, self._read(batches, refs))
        self.refs = refs

    def _read(self, batches: Iterable[pa.RecordBatch], refs: list[FileRef]) -> Iterator[pa.RecordBatch]:
        from marble._core.entry_batch import decode_payload
        from marble.lsm.snapshot import _aligned

        for batch in batches:
            for row in range(batch.num_rows):
                one = batch.slice(row, 1)
                if one.column("section")[0].as_py() != FILES:
                    yield one
                    continue
                listed = decode_payload(_aligned(one.column("payload")[0].as_buffer()), FILES_SCHEMA)
                for name, nbytes in zip(
                    listed.column("name").to_pylist(), listed.column("nbytes").to_pylist(), strict=True
                ):
                    refs.append(FileRef(name, nbytes))
                    yield pa.ipc.read_record_batch(pa.py_buffer(self.load(refs[-1])), SNAPSHOT_SCHEMA)

    def load(self, ref: FileRef) -> bytes:
        """The bytes of a file. One that is wrong is noted."""
        path = self.path(ref.name)
        data = self.disk.read(path) if self.disk.exists(path) else b""
        if content_name(data) != ref.name:
            if ref not in self.bad:
                self.bad.append(ref)
            raise CorruptionError("a file of a table is damaged", self.disk.describe(path), 0)
        return data

    def read_all(self) -> None:
        """What reads of all tables would touch."""
        for ref in self.refs:
            self.load(ref)

    def damaged(self) -> Sequence[FileRef]:
        return list(self.bad)

    def healed(self, name: str) -> None:
        for ref in [ref for ref in self.bad if ref.name == name]:
            self.bad.remove(ref)
            self.load(ref)

    def blame(self, error: CorruptionError) -> bool:
        return False

    def salvage(self, index: int, batches: Iterable[pa.RecordBatch]) -> None:
        self.restore(index, batches)

    def collect(self, kept: Callable[[], Collection[str]]) -> int:
        if not self.disk.exists("tables"):
            return 0
        needed = {self.path(name) for name in [*kept(), *(ref.name for ref in self.refs)]}
        gone = [f"tables/{name}" for name in self.disk.list("tables") if name.endswith(".arrow")]
        gone = [path for path in gone if path not in needed]
        for path in gone:
            self.disk.remove(path)
        if gone:
            self.disk.sync_directory("tables")
        self.collected += len(gone)
        return len(gone)
