"""Parsers of files: the config, who a directory belongs to, segments of the log, snapshots and what is in them, tables.

Files of a node are its own, but disks lie, backups travel, and snapshots and tables come from peers.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from fuzz.data_targets import STORED, _rows
from fuzz.target import Target, join, split
from fuzz.wire_targets import SCHEMA
from logstore.snapshot_support import ENDPOINTS, NAME, meta, state
from logstore.support import SEGMENT, SYNCED, contents, disk, entries
from reference import frame as frame_twin
from reference import sstable as sstable_twin

from marble import identity
from marble._core import entry_batch
from marble._core.checksum import xxh3_64
from marble._core.entry_batch import Proposal
from marble._core.lsm import Reader
from marble.config import parse_config
from marble.errors import CorruptionError, UsageError
from marble.logstore.log import Log
from marble.logstore.snapshot_file import FILE_SCHEMA, FileReader, row_checksums
from marble.logstore.snapshots import SnapshotStore
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.machine import SNAPSHOT_SCHEMA
from marble.types import EntryKind, HardState

# -- config --------------------------------------------------------------------------------------------------------------

_CONFIGS = (
    """
[node]
id = 1
data_dir = "data"
listen = "0.0.0.0:5001"
priority = 3
[cluster]
cluster_id = "c"
node_endpoints = ["a:5001", "b:5001", "[::1]:5003"]
election_timeout_ms = 1500
heartbeat_interval_ms = 300
max_log_size = 1_000_000_000
""",
    """
[node]
id = 7
data_dir = "/x"
join = true
endpoint = "g:5001"
[cluster]
cluster_id = "c"
node_endpoints = { 1 = "a:5001", 2 = "b:5001" }
lease_reads = true
""",
)


def _parse_config(data: bytes) -> None:
    # `load_config` has told about what is not UTF-8 before.
    config = parse_config(data.decode(errors="replace"), Path("/nowhere"))
    assert config.cluster.endpoints


# -- who a directory belongs to ------------------------------------------------------------------------------------------


def _identities() -> list[bytes]:
    files = disk()
    identity.bind(files, "cluster", 1, (1, 2, 3))
    return [files.read(identity.IDENTITY_FILE)]


def _parse_identity(data: bytes) -> None:
    files = disk()
    files.put(identity.IDENTITY_FILE, data)
    identity.bind(files, "cluster", 1, (1, 2, 3))


def _parse_acquaintances(data: bytes) -> None:
    files = disk()
    files.put(identity.ACQUAINTANCES_FILE, data)
    identity.read_acquaintances(files)


def _mend_sealed(data: bytes) -> bytes:
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        if isinstance(found, dict):
            return identity.seal(found)
    return data


# -- the log -------------------------------------------------------------------------------------------------------------


def _logs() -> list[bytes]:
    """A segment and the mark beside it."""
    files = disk()
    log = Log.open(files)
    log.append(1, HardState(2, 3, 2), entries(1, [1, 1, 2]))
    log.sync()
    log.append(1, None, entries(3, [3, 3]))
    log.append(2, HardState(1, 1, 0), entries(1, [1], group=2))
    log.sync()
    log.start_after(1, 1, 1)
    log.sync()
    return [join(files.read(SYNCED), files.read(SEGMENT(1)))]


def _parse_log(data: bytes) -> None:
    mark, segment = split(data, 2)
    files = disk()
    files.put(SYNCED, mark)
    files.put(SEGMENT(1), segment)
    contents(Log.open(files))


def _mend_log(data: bytes) -> bytes:
    """Seal each frame again as the one that follows the one before it. The seal's text says where each begins and how long it is."""
    mark, segment = split(data, 2)
    out = bytearray(segment)
    chain = 0
    for number, found in enumerate(re.finditer(re.escape(frame_twin.MAGIC), segment)):
        start = found.start() - (frame_twin.SEAL_AT if number else _header_seal_at(segment))
        with contextlib.suppress(ValueError):
            length = int(bytes(out[found.end() : found.end() + 16]), 16)
            if start < 0 or length > len(out) - start:
                continue
            out[found.end() + 64 : found.end() + 96] = f"{chain:016x}{0:016x}".encode()
            chain = xxh3_64(bytes(out[start : start + length]))
            out[found.end() + 80 : found.end() + 96] = f"{chain:016x}".encode()
    return join(mark, bytes(out))


def _header_seal_at(segment: bytes) -> int:
    return segment.find(frame_twin.MAGIC)


# -- snapshots -----------------------------------------------------------------------------------------------------------


def _snapshots() -> list[bytes]:
    files = disk()
    store = SnapshotStore(files, 1)
    store.write(meta(10), ENDPOINTS, state(10, 2, 40))
    return [files.read(NAME(10))]


def _parse_snapshot(data: bytes) -> None:
    files = disk()
    files.put(NAME(10), data)
    reader = FileReader(files, NAME(10))
    reader.verify(1)
    for batch in reader.rows():
        batch.validate(full=True)
    reader.refs()


def _mend_snapshot(data: bytes) -> bytes:
    """The same rows with the right checksums, as far as there are any."""
    sink, rows = pa.BufferOutputStream(), 0
    with contextlib.suppress(pa.ArrowException, OSError, ValueError, KeyError):
        with pa.ipc.open_stream(data) as reader, pa.ipc.new_stream(sink, FILE_SCHEMA) as writer:
            for batch in reader if reader.schema.equals(FILE_SCHEMA) else ():
                batch.validate(full=True)
                columns = [*batch.columns[:-1], pa.array(row_checksums(batch, rows), pa.uint64())]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=FILE_SCHEMA))
                rows += batch.num_rows
        return bytes(sink.getvalue().to_pybytes()) if rows else data
    return data


def _states() -> list[bytes]:
    """What a machine's snapshot consists of: sections, each of them a part that `join` puts together."""
    machine = TableMachine()
    proposals = [
        Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("people", SCHEMA, ["id"])),
        Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("rich", STORED, ["k"])),
        Proposal(EntryKind.OPEN_SESSION),
        Proposal(EntryKind.WRITE, 1, payload.encode_rows(_rows()[0]), 3, 1),
        Proposal(EntryKind.WRITE, 2, payload.encode_rows(_rows(STORED)[0])),
        Proposal(EntryKind.DELETE, 1, payload.encode_rows(_rows()[0].select(["id"]).slice(2)), 3, 2),
    ]
    machine.apply(entry_batch.build(0, 1, 1, proposals, 5))
    rows = [row for batch in machine.capture().batches() for row in batch.to_pylist()]
    parts = [join(row["section"].encode(), struct.pack("<I", row["table"]), row["payload"]) for row in rows]
    return [join(*parts, *([b""] * (_SECTIONS - len(parts)))), join(*parts[:2], *([b""] * (_SECTIONS - 2)))][:1]


_SECTIONS = 12


def _parse_state(data: bytes) -> None:
    rows = []
    for part in filter(None, split(data, _SECTIONS)):
        section, table, body = split(part, 3)
        number = int.from_bytes(table[:4], "little")
        rows.append({"section": section.decode(errors="replace"), "table": number, "payload": body})
    machine = TableMachine()
    machine.restore(6, [pa.RecordBatch.from_pylist(rows, SNAPSHOT_SCHEMA)])
    for info in machine.tables():
        machine.read(info.id).scan().read_all().validate(full=True)


# -- tables --------------------------------------------------------------------------------------------------------------

_FILE_ROWS = pa.schema(
    [pa.field("k", pa.string(), False), pa.field("v", pa.string()), pa.field("n", pa.list_(pa.int8()))]
)


def _tables() -> list[bytes]:
    keys = sorted(f"key {n}" for n in range(20))
    values = [None if n % 7 == 0 else "compressible " * 3 for n in range(20)]
    batch = pa.record_batch([pa.array(keys), pa.array(values), pa.array([[n] for n in range(20)])], schema=_FILE_ROWS)
    flags = [n % 5 == 0 for n in range(20)]
    return [
        sstable_twin.write([batch], deleted=[flags], block_rows_max=8, compression=each)[0]
        for each in (None, "lz4", "zstd")
    ]


def _parse_table(data: bytes) -> None:
    table = sstable_twin.open_bytes(data, _FILE_ROWS)
    table.zone_maps().validate(full=True)
    wanted = pa.record_batch([pa.array(["key 1", "key 7", "none"])], names=["k"])
    table.may_contain(wanted)
    table.get_many(wanted)[0].validate(full=True)
    for batch in table.scan(versions=True):
        batch.validate(full=True)
    for batch in table.scan(["n"], b"\x01", None, reverse=True):
        batch.validate(full=True)
    table.verify()


_FLAT_ROWS = pa.schema([pa.field("k", pa.string(), False), pa.field("v", pa.string()), pa.field("d", pa.date64())])


def _flat_tables() -> list[bytes]:
    """Files whose rows can be read without their blocks; the second one is of the first version, which cannot."""
    days = [None if n % 3 == 0 else n * 86_400_000 for n in range(20)]
    columns = [pa.array(sorted(f"key {n}" for n in range(20))), pa.array(["välue"] * 20), pa.array(days, pa.date64())]
    flags = [n % 5 == 0 for n in range(20)]
    data, _ = sstable_twin.write([pa.record_batch(columns, schema=_FLAT_ROWS)], deleted=[flags], block_rows_max=8)
    return [data, sstable_twin.as_version_1(data)]


def _parse_flat_table(data: bytes) -> None:
    table = sstable_twin.open_bytes(data, _FLAT_ROWS)
    reader, damage = Reader([], [[table]]), []
    for n in range(-1, 20, 2):
        # One row that cannot be read says nothing of the next.
        try:
            reader.get_row(("k", "v", "d"), (f"key {n}",))
            wanted = pa.record_batch([pa.array([f"key {n + 1}"])], names=["k"])
            reader.get_many(wanted)[0].validate(full=True)
        except CorruptionError as error:
            damage.append(error)
    table.verify()
    if damage:
        raise damage[0]


def _mend_table(data: bytes) -> bytes:
    with contextlib.suppress(ValueError, struct.error, IndexError, OverflowError):
        parts = sstable_twin.Parts(data)
        return parts.rebuild() if len(data) % 2 else parts.seal_again()
    return data


FILE_TARGETS: Sequence[Target] = (
    Target("config", lambda: [text.encode() for text in _CONFIGS], _parse_config, (UsageError,)),
    Target("identity", _identities, _parse_identity, (CorruptionError, UsageError), _mend_sealed),
    Target(
        "acquaintances",
        lambda: [identity.seal({"met": {"2": "00000000000000ff", "3": "0123456789abcdef"}})],
        _parse_acquaintances,
        (CorruptionError,),
        _mend_sealed,
    ),
    Target("log", _logs, _parse_log, (CorruptionError,), _mend_log),
    Target("snapshot", _snapshots, _parse_snapshot, (CorruptionError,), _mend_snapshot),
    Target("state", _states, _parse_state, (CorruptionError,)),
    Target("sstable", _tables, _parse_table, (CorruptionError, UsageError), _mend_table),
    Target("sstable rows", _flat_tables, _parse_flat_table, (CorruptionError, UsageError), _mend_table),
)
