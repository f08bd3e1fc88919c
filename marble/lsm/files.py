"""The files of tables: written once, named by what is in them, mapped, removed when nobody needs them.

Files, all in one directory; ``G`` is the group as 8 hexadecimal digits, so that groups of one node do not meet:

- ``G-NAME.arrow``: an sstable (`marble._core.sstable`); ``NAME`` is the XXH3-128 of its bytes as 32 hexadecimal digits.
- ``G-N.tmp``: being written, or left by a crash; never read.

Rule 1: a name that ends in ``.arrow`` is given by a rename after a sync of everything in the file, and nothing refers to
it before a sync of the directory. A name says what the bytes are, so writing it again does no harm, and mends it.
Rule 2: after a failed write or sync a file is given up; it is never synced again.
Rule 3: a mapping outlives its file's name: readers never wait for a removal, nor it for them.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import pyarrow as pa

from marble._core.checksum import Xxh3Name
from marble._core.sstable import BlockCache, SSTable, SSTableInfo, SSTableWriter
from marble.env import Files
from marble.errors import CorruptionError
from marble.machine import FILES_SCHEMA, FileRef, Pace
from marble.schema import TableInfo
from marble.writing import SYNC_BYTES, write_paced

DIRECTORY: Final = "tables"

CACHE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Decoded blocks kept by default."""

MAP_AHEAD_BYTES_MAX: Final = 256 * 1024 * 1024
"""What is mapped ahead of a file that was written, and of all files that a start finds: it takes some 10 ms."""

BLOCK_ROWS_MAX: Final = 4096
"""Rows of a block: a read of one key decodes one block, where its bytes do not end it before."""

Compression = Literal["lz4", "zstd"]
Versions = tuple[pa.RecordBatch, pa.UInt64Array, pa.BooleanArray]
"""Rows by ascending key, the Raft index of each one's write, and which of them are tombstones."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file of a table. Keys are encoded (`marble._core.key_codec`); all ranges include both ends.

    - ``rows`` counts tombstones too.
    - ``ttl_max`` is None if a row has no time: then the file never expires.
    - ``table`` is the file itself, mapped; None where only plans are made, or if ``damage`` says why it could not be.
    """

    name: str
    nbytes: int
    rows: int
    tombstones: int
    first_key: bytes
    last_key: bytes
    first_index: int
    last_index: int
    ttl_min: int | None = None
    ttl_max: int | None = None
    table: SSTable | None = field(default=None, compare=False, repr=False)
    damage: CorruptionError | None = field(default=None, compare=False, repr=False)

    @property
    def ref(self) -> FileRef:
        """How others call it."""
        return FileRef(self.name, self.nbytes)

    @property
    def opened(self) -> SSTable:
        """The file, mapped. Raises CorruptionError if it could not be."""
        if self.damage is not None:
            raise CorruptionError(self.damage.problem, self.damage.path, self.damage.offset)
        assert self.table is not None
        return self.table

    def meets(self, first_key: bytes, last_key: bytes) -> bool:
        """Whether its range of keys and this one have a key in common."""
        return self.first_key <= last_key and first_key <= self.last_key


def encode_files(levels: Sequence[Sequence[TableFile]]) -> pa.RecordBatch:
    """One row of `FILES_SCHEMA` for each file, level by level, each in its order."""
    names = [name for name in FILES_SCHEMA.names if name != "level"]
    rows = [
        {"level": level, **{name: getattr(file, name) for name in names}}
        for level, files in enumerate(levels)
        for file in files
    ]
    return pa.RecordBatch.from_pylist(rows, FILES_SCHEMA)


class TableFiles:
    """The files of the tables of one group.

    Thread safety: `write` on any threads, `open` too; `collect` beside both.

    Parameters
    ----------
    files
        The node's files. Nothing is touched before the first call.
    group
        The group.
    cache
        Keeps blocks that were read.
    block_rows_max
        Most rows of a block of the files that are written.
    """

    def __init__(
        self, files: Files, group: int = 0, cache: BlockCache | None = None, *, block_rows_max: int = BLOCK_ROWS_MAX
    ) -> None:
        self.cache = cache or BlockCache(CACHE_BYTES_MAX)
        self._files = files
        self._group = group
        self._block_rows_max = block_rows_max
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._released: set[str] = set()
        """What was released since the last `collect` began."""
        self._ahead_left = MAP_AHEAD_BYTES_MAX
        """Of files that were here before this process."""
        self._next = 0
        self._ready = False

    def path(self, name: str) -> str:
        """Where the file with this name is."""
        return f"{DIRECTORY}/{self._group:08x}-{name}.arrow"

    def names(self) -> list[str]:
        """The files that are there, needed or not."""
        self.prepare()
        pattern = re.compile(rf"{self._group:08x}-([0-9a-f]{{32}})\.arrow")
        return [match[1] for name in self._files.list(DIRECTORY) if (match := pattern.fullmatch(name))]

    def prepare(self) -> None:
        """Make the directory, and clear what an earlier process was writing. Done by itself before the first file."""
        with self._lock:
            if self._ready:
                return
            self._files.make_directory(DIRECTORY)
            # A process may have been killed between a rename and its sync: from here on the names are relied upon.
            self._files.sync_directory("")
            for name in self._files.list(DIRECTORY):
                if re.fullmatch(rf"{self._group:08x}-[0-9]+\.tmp", name):
                    self._files.remove(f"{DIRECTORY}/{name}")
            self._files.sync_directory(DIRECTORY)
            self._ready = True

    def write(
        self,
        info: TableInfo,
        versions: Iterable[Versions],
        *,
        bytes_max: int | None = None,
        compression: Compression | None = None,
        pace: Pace | None = None,
    ) -> list[TableFile]:
        """Write rows to new files. They are durable only after `sync_directory`.

        Parameters
        ----------
        info
            The table.
        versions
            By ascending key, each key once.
        bytes_max
            A file ends when it has so many bytes. None: all goes into one.
        compression
            Of the files' blocks.
        pace
            Called after each sync of a part with the bytes that it had; may wait, and may raise to give up.

        Returns
        -------
        list of TableFile
            By ascending key; none if there were no rows. They are held: `release` them.

        Raises
        ------
        OSError
            The disk failed or is full. None of the files is of use.
        CorruptionError
            `versions` raised it.
        """
        self.prepare()
        written: list[TableFile] = []
        source = iter(versions)
        try:
            while (first := next(source, None)) is not None:
                writer = SSTableWriter(
                    info.schema,
                    info.key,
                    block_rows_max=self._block_rows_max,
                    compression=compression,
                    ttl_column=info.options.ttl_column,
                )
                found = self._write_one(_Pieces(writer, first, source, bytes_max), pace)
                row = {name: getattr(found, name) for name in FILES_SCHEMA.names if name != "level"}
                try:
                    written.append(self.open(row, info))
                    written[-1].opened.map_ahead(MAP_AHEAD_BYTES_MAX)  # All of it is in memory now.
                except Exception:
                    self.release([found.name])
                    raise
        except Exception:
            self.release(file.name for file in written)
            raise
        return written

    def hold(self, names: Iterable[str]) -> None:
        """Keep the files with these names, there or still to come, until they are released as often as held."""
        with self._lock:
            self._held.update(names)

    def release(self, names: Iterable[str]) -> None:
        """Undo one `hold`, or what `write` held: the files are part of the state by now, or will never be."""
        with self._lock:
            released = list(names)
            self._held.subtract(released)
            self._held += Counter()  # Forgets the zeros.
            self._released.update(released)

    def sync_directory(self) -> None:
        """Make durable the names of all files that `write` has returned."""
        self._files.sync_directory(DIRECTORY)

    def open(self, row: dict[str, Any], info: TableInfo) -> TableFile:
        """Map the file that a row of `FILES_SCHEMA` describes, and check all of it but its blocks.

        Raises
        ------
        CorruptionError
            It is missing, of another length, damaged, or does not hold what the row says.
        """
        name = row["name"]
        where = self._files.describe(self.path(name))
        if not re.fullmatch("[0-9a-f]{32}", name) or not self._files.exists(self.path(name)):
            raise CorruptionError(f"a file of table {info.name!r} is missing", where)
        size = self._files.size(self.path(name))
        if size != row["nbytes"]:
            raise CorruptionError(f"a file of table {info.name!r} has {size} bytes, not {row['nbytes']}", where, size)
        table = SSTable.open(self._files.map(self.path(name)), info.schema, info.key, self.cache, where)
        described = {field: row[field] for field in FILES_SCHEMA.names if field not in ("level", "name")}
        if any(getattr(table.info, field) != value for field, value in described.items()):
            raise CorruptionError(f"a file of table {info.name!r} is not the one that its snapshot describes", where, 0)
        return TableFile(name=name, **described, table=table)

    def salvage(self, row: dict[str, Any], info: TableInfo) -> TableFile:
        """As `open`; a file that is missing or damaged has ``damage`` instead of ``table``."""
        try:
            file = self.open(row, info)
            mapped = file.opened.map_ahead(self._ahead_left)
            with self._lock:
                self._ahead_left = max(0, self._ahead_left - mapped)
            return file
        except CorruptionError as error:
            described = {field: row[field] for field in FILES_SCHEMA.names if field != "level"}
            return TableFile(**described, damage=error)

    def name_of(self, path: str) -> str | None:
        """The name of the file at `path`, which is as `Files.describe` gives it; None if that is none of these."""
        match = re.fullmatch(rf"(?:.*[/:])?{DIRECTORY}/{self._group:08x}-([0-9a-f]{{32}})\.arrow", path)
        return None if match is None else match[1]

    def describe(self, name: str) -> str:
        """The path of the file with this name, for messages."""
        return self._files.describe(self.path(name))

    def is_sound(self, name: str, pace: Pace | None = None) -> bool:
        """Whether the file is there and its bytes are those that its name stands for. Reads all of it, at the pace given."""
        path, total, offset = self.path(name), Xxh3Name(), 0
        try:
            while data := self._files.read(path, offset, SYNC_BYTES):
                total.update(data)
                offset += len(data)
                if pace is not None:
                    pace(len(data))
        except OSError:
            return False
        return total.name() == name

    def collect(self, needed: Callable[[], Collection[str]]) -> int:
        """Remove all files but those that `needed` names and those that are held. Returns the bytes given back.

        `needed` is called once; what somebody wrote, put into the state and released since then stays.
        """
        self.prepare()
        with self._lock:
            self._released.clear()
        names = self.names()
        kept = needed()
        nbytes = removed = 0
        for name in names:
            with self._lock:  # Writers hold a name before they give it.
                if name not in kept and name not in self._held and name not in self._released:
                    nbytes += self._files.size(self.path(name))
                    self._files.remove(self.path(name))
                    removed += 1
        if removed:
            self._files.sync_directory(DIRECTORY)
        return nbytes

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write_one(self, pieces: _Pieces, pace: Pace | None) -> SSTableInfo:
        with self._lock:
            temporary = f"{DIRECTORY}/{self._group:08x}-{self._next}.tmp"
            self._next += 1
        file = self._files.create(temporary)
        try:
            with contextlib.closing(file):
                write_paced(file, pieces, pace)
            info = pieces.info
            assert info is not None
            self.hold([info.name])
            try:
                self._files.rename(temporary, self.path(info.name))
            except Exception:
                self.release([info.name])
                raise
        except Exception:
            # A disk that is full needs the room.
            with contextlib.suppress(OSError):
                self._files.remove(temporary)
            raise
        return info


class _Pieces:
    """The bytes of one file, made while they are iterated; ``info`` says what the file is when they are all there."""

    def __init__(
        self, writer: SSTableWriter, first: Versions, source: Iterator[Versions], bytes_max: int | None
    ) -> None:
        self.info: SSTableInfo | None = None
        self._writer = writer
        self._first = first
        self._source = source
        self._bytes_max = bytes_max

    def __iter__(self) -> Iterator[pa.Buffer]:
        writer, versions = self._writer, self._first
        while True:
            yield from writer.add(*versions)
            if self._bytes_max is not None and writer.nbytes >= self._bytes_max:
                break
            following = next(self._source, None)
            if following is None:
                break
            versions = following
        rest, self.info = writer.finish()
        yield rest
