"""The file of a snapshot: an Arrow IPC stream that any Arrow tool opens, and how it is written, verified and read.

Layout: a schema message (`FILE_SCHEMA`), one message for each batch of rows, and the end-of-stream mark. Row 0 is the
section "meta": as JSON who the snapshot is of. Then come the rows of the machine. The last row is the section "end": JSON
of a fixed length, with the number of rows before it and the XXH3-64 of all bytes of the file before its message.

Rule 1: every byte is under a checksum. Each row has its own, over its number, section, table and payload: a row is
checked when it is read, and rows cannot be dropped, repeated or swapped. The end's covers the file around them.
Rule 2: a file that lacks its end is not a snapshot. Whatever is not as it should be is `CorruptionError`, with the
offset of the message in which it was found.
Rule 3: nothing that a length in the file says makes a reader take more memory than the file is large.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from marble._core.checksum import Xxh3, xxh3_64
from marble._core.entry_batch import decode_payload
from marble.env import Files
from marble.errors import CorruptionError, ProtocolError
from marble.machine import FILES, FILES_SCHEMA, SNAPSHOT_SCHEMA, FileRef
from marble.types import INDEX_MAX, NODE_ID_MAX, PAYLOAD_ALIGNMENT_BYTES, Members, SnapshotMeta

FORMAT: Final = "1"
FILE_SCHEMA: Final = SNAPSHOT_SCHEMA.append(pa.field("checksum", pa.uint64(), nullable=False))
META: Final = "meta"
END: Final = "end"

WINDOW_BYTES: Final = 4 * 1024 * 1024
"""How much of a file is read at a time where the messages do not matter."""

_END_OF_STREAM: Final = struct.pack("<II", 0xFFFFFFFF, 0)
_ROW: Final = struct.Struct("<QI")
_FILE_NAME: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot and its file.

    Attributes
    ----------
    group, index, term
        The state of which group after which entry.
    members
        Who the members were then.
    endpoints
        Where they were to be reached, ``host:port`` by node id.
    nbytes
        Length of the file.
    checksum
        XXH3-64 of the whole file.
    """

    group: int
    index: int
    term: int
    members: Members
    endpoints: Mapping[int, str] = field(hash=False)
    nbytes: int
    checksum: int

    @property
    def meta(self) -> SnapshotMeta:
        """What the core has to know of it."""
        return SnapshotMeta(self.index, self.term, self.members)


class Encoder:
    """Makes the messages of one file, in order: `head`, `rows` as often as wanted, `tail`."""

    def __init__(self) -> None:
        self._hash = Xxh3()
        self._rows = 0
        self.nbytes = 0

    @property
    def checksum(self) -> int:
        """XXH3-64 of everything made so far."""
        return self._hash.digest()

    def head(self, group: int, meta: SnapshotMeta, endpoints: Mapping[int, str]) -> list[pa.Buffer]:
        """The schema and the meta row."""
        described = _row(META, encode_meta(group, meta, endpoints))
        return [self._made(FILE_SCHEMA.serialize()), self.rows(described)]

    def rows(self, batch: pa.RecordBatch) -> pa.Buffer:
        """A message with the rows of `batch` (schema `SNAPSHOT_SCHEMA`), each with its checksum."""
        checksums = row_checksums(batch, self._rows)
        self._rows += batch.num_rows
        sealed = pa.RecordBatch.from_arrays([*batch.columns, pa.array(checksums, pa.uint64())], schema=FILE_SCHEMA)
        return self._made(sealed.serialize())

    def tail(self) -> list[pa.Buffer]:
        """The end."""
        end = self.rows(_row(END, _encode_end(self._rows, self.checksum)))
        return [end, self._made(pa.py_buffer(_END_OF_STREAM))]

    def _made(self, message: pa.Buffer) -> pa.Buffer:
        self._hash.update(message)
        self.nbytes += message.size
        return message


def row_checksums(batch: pa.RecordBatch, first: int) -> list[int]:
    """The checksums of rows, the first of which is row `first` of its file.

    XXH3-64 of the payload; its seed is the XXH3-64 of little-endian ``struct "<QI"`` of (number, table) and the section.
    """
    sections = batch.column("section").to_pylist()
    tables = batch.column("table").to_pylist()
    payloads = batch.column("payload")
    return [
        xxh3_64(payloads[row].as_buffer(), xxh3_64(_ROW.pack(first + row, table) + section.encode()))
        for row, (section, table) in enumerate(zip(sections, tables, strict=True))
    ]


def _row(section: str, payload: bytes) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"section": section, "table": 0, "payload": payload}], SNAPSHOT_SCHEMA)


def encode_meta(group: int, meta: SnapshotMeta, endpoints: Mapping[int, str]) -> bytes:
    """The payload of the meta row."""
    members = meta.members
    value = {
        "format": FORMAT,
        "group": group,
        "index": meta.index,
        "term": meta.term,
        "members": {
            "voters": members.voters,
            "outgoing": members.outgoing,
            "learners": members.learners,
            "learners_next": members.learners_next,
            "auto_leave": members.auto_leave,
        },
        "endpoints": {str(node): endpoints[node] for node in sorted(endpoints)},
    }
    return json.dumps(value).encode()


def decode_meta(payload: bytes) -> tuple[int, SnapshotMeta, dict[int, str]]:
    """Group, description and endpoints. Raises ValueError if that is not what `payload` says."""
    try:
        value = json.loads(payload)
        if value["format"] != FORMAT:
            raise ValueError(f"it has format {value['format']!r}, this marble reads format {FORMAT}: use its marble")
        listed = value["members"]
        voters, outgoing = _nodes(listed["voters"]), _nodes(listed["outgoing"])
        learners, learners_next = _nodes(listed["learners"]), _nodes(listed["learners_next"])
        if type(listed["auto_leave"]) is not bool:
            raise ValueError("auto_leave is no boolean")
        endpoints = {_whole(int(node), NODE_ID_MAX): endpoint for node, endpoint in value["endpoints"].items()}
        if not all(isinstance(endpoint, str) for endpoint in endpoints.values()):
            raise ValueError("an endpoint is no text")
        members = Members(voters, outgoing, learners, learners_next, listed["auto_leave"])
        meta = SnapshotMeta(_whole(value["index"], INDEX_MAX), _whole(value["term"], INDEX_MAX), members)
        return _whole(value["group"], 2**32 - 1), meta, endpoints
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its description is not one: {error!r}") from None


def _nodes(value: Any) -> tuple[int, ...]:
    nodes = tuple(_whole(node, NODE_ID_MAX) for node in value)
    if list(nodes) != sorted(set(nodes)):
        raise ValueError("members do not ascend")
    return nodes


def _whole(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no number from 0 to {most}")
    return value


def _encode_end(rows: int, checksum: int) -> bytes:
    return json.dumps({"rows": f"{rows:016x}", "checksum": f"{checksum:016x}"}).encode()


END_BYTES: Final = sum(message.size for message in Encoder().tail())
"""Length of the end, with the mark behind it: always the same."""


class _Source:
    """What pyarrow reads messages from: a file from some offset on. Never gives more than there is."""

    closed = False
    mode = "rb"

    def __init__(self, files: Files, path: str, offset: int, size: int) -> None:
        self._files = files
        self._path = path
        self._size = size
        self.offset = offset

    def read(self, size: int = -1) -> bytes:
        wanted = self._size - self.offset if size < 0 else min(size, self._size - self.offset)
        data = self._files.read(self._path, self.offset, wanted)
        self.offset += len(data)
        return data

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One message of rows: where it ends in the file, and its rows without their checksums."""

    end: int
    batch: pa.RecordBatch


class FileReader:
    """Reads one file.

    Parameters
    ----------
    files
        Where it is.
    path
        Its path.
    """

    def __init__(self, files: Files, path: str) -> None:
        self.size = files.size(path)
        self._files = files
        self._path = path

    def verify(self, group: int) -> SnapshotInfo:
        """Read all of it once, and return what it is.

        Raises
        ------
        CorruptionError
            Any bit of it is not as it was written, or it is of another group.
        """
        found, meta, endpoints = self.describe()
        if found != group:
            raise self.damage(0, f"it is a snapshot of group {found}, not of {group}")
        body = self.size - END_BYTES
        total = Xxh3()
        offset = 0
        inside = 0
        while offset < self.size:
            window = min(WINDOW_BYTES, (body if offset < body else self.size) - offset)
            data = self._files.read(self._path, offset, window)
            if not data:
                raise self.damage(offset, "it became shorter while it was read")
            total.update(data)
            offset += len(data)
            if offset == body:
                inside = total.digest()
        self._check_end(inside)
        return SnapshotInfo(found, meta.index, meta.term, meta.members, endpoints, self.size, total.digest())

    def describe(self) -> tuple[int, SnapshotMeta, dict[int, str]]:
        """Group, description and endpoints, as its first row says."""
        first = next(self.pieces(), None)
        if first is None or first.batch.num_rows != 1 or first.batch.column("section")[0].as_py() != META:
            raise self.damage(0, "it does not begin with its description")
        try:
            return decode_meta(first.batch.column("payload")[0].as_py())
        except ValueError as error:
            raise self.damage(0, str(error)) from None

    def _check_end(self, inside: int) -> None:
        offset = self.size - END_BYTES
        if offset <= 0:
            raise self.damage(0, "it lacks its end")
        batch = self._message(_Source(self._files, self._path, offset, self.size), offset)
        if batch is None or batch.num_rows != 1 or batch.column("section")[0].as_py() != END:
            raise self.damage(offset, "it lacks its end")
        payload = batch.column("payload")[0].as_py()
        try:
            rows = _whole(int(json.loads(payload)["rows"], 16), INDEX_MAX)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self.damage(offset, "its end is none") from None
        if row_checksums(batch, rows) != batch.column("checksum").to_pylist():
            raise self.damage(offset, "its end is damaged")
        whole = self._made_again(rows, inside)
        if self._files.read(self._path, offset, END_BYTES) != whole:
            raise self.damage(offset, "its end does not fit what is before it")

    def _made_again(self, rows: int, inside: int) -> bytes:
        """The end of a file with so many rows and this checksum before it, to the byte."""
        batch = _row(END, _encode_end(rows, inside))
        checksums = pa.array(row_checksums(batch, rows), pa.uint64())
        sealed = pa.RecordBatch.from_arrays([*batch.columns, checksums], schema=FILE_SCHEMA)
        return bytes(sealed.serialize().to_pybytes() + _END_OF_STREAM)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """The rows between meta and end (schema `SNAPSHOT_SCHEMA`), each verified.

        Raises
        ------
        CorruptionError
            While iterating, at the first message that is damaged, or at the end if rows are missing there.
        """
        for number, piece in enumerate(self.pieces()):
            section = piece.batch.column("section")[0].as_py()
            if piece.end == self.size - len(_END_OF_STREAM) and section == END:
                return
            if number > 0:
                yield piece.batch
        raise self.damage(self.size, "it lacks its end")

    def refs(self) -> tuple[FileRef, ...]:
        """The files that the state refers to, each once, in their order. Raises CorruptionError as `rows` does."""
        found: dict[str, FileRef] = {}
        for batch in self.rows():
            for section, payload in zip(batch.column("section"), batch.column("payload"), strict=True):
                if section.as_py() == FILES:
                    for ref in self._listed(payload.as_buffer()):
                        if found.setdefault(ref.name, ref) != ref:
                            raise self.damage(0, f"the file {ref.name} has two lengths")
        return tuple(found.values())

    def _listed(self, payload: pa.Buffer) -> Iterator[FileRef]:
        """The files that the payload of one row names."""
        aligned = pa.allocate_buffer(payload.size)
        memoryview(aligned)[:] = memoryview(payload)
        try:
            listed = decode_payload(aligned, FILES_SCHEMA).select(["name", "nbytes"])
            listed.validate(full=True)
        except (ProtocolError, pa.ArrowException) as error:
            raise self.damage(0, f"its list of files cannot be read: {error}") from None
        for name, nbytes in zip(*(column.to_pylist() for column in listed.columns), strict=True):
            # It may come from a peer, and becomes the name of a file.
            if name is None or not _FILE_NAME.fullmatch(name) or nbytes is None or not 0 < nbytes <= INDEX_MAX:
                raise self.damage(0, f"it refers to a file {name!a} of {nbytes} bytes")
            yield FileRef(name, nbytes)

    def pieces(self) -> Iterator[Piece]:
        """All messages with rows, meta and end included, as far as the file goes."""
        source = _Source(self._files, self._path, 0, self.size)
        try:
            message = pa.ipc.read_message(source)
            # pyarrow takes any message for a schema and follows its offsets: a process was seen to die of that.
            schema = pa.ipc.read_schema(message) if message.type == "schema" else None
        except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
            _raise_if_disk(error)
            raise self.damage(0, f"its schema cannot be read: {error}") from None
        if schema is None or not schema.equals(FILE_SCHEMA):
            raise self.damage(0, "its schema is not that of a snapshot")
        rows = 0
        while (batch := self._message(source, start := source.offset)) is not None:
            if row_checksums(batch, rows) != batch.column("checksum").to_pylist():
                raise self.damage(start, "a row is not what was written")
            rows += batch.num_rows
            yield Piece(source.offset, batch.drop_columns(["checksum"]))

    def _message(self, source: _Source, start: int) -> pa.RecordBatch | None:
        """The batch at `start`, with sound offsets and no nulls; None at the end-of-stream mark or the end of the file."""
        try:
            message = pa.ipc.read_message(source)
            data = bytearray(message.serialize())
            # The decoder of payloads also refuses compression and lengths that lead outside, as pyarrow's does not.
            data += bytes(-len(data) % PAYLOAD_ALIGNMENT_BYTES)
            batch = decode_payload(pa.py_buffer(data), FILE_SCHEMA)
            batch.validate(full=True)
        except EOFError:
            return None
        except (ProtocolError, pa.ArrowException, OSError) as error:
            _raise_if_disk(error)
            raise self.damage(start, f"a batch cannot be read: {error}") from None
        if batch.num_rows == 0 or any(column.null_count for column in batch.columns):
            raise self.damage(start, "a batch has no rows, or nulls")
        return batch

    def damage(self, offset: int, what: str) -> CorruptionError:
        """The error that says so."""
        where = self._files.describe(self._path)
        return CorruptionError(f"a snapshot is damaged: {what}: do not use it", where, offset)


def _raise_if_disk(error: Exception) -> None:
    """Raise `error` again if the disk failed: that says nothing about the file. Arrow's own errors are OSErrors without a number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
