"""The seam between the ordered log and what it drives: the replicated state machine.

The driver calls `StateMachine.apply` with committed entries, in order, each exactly once per life of the machine.
Apply must be deterministic: it may use nothing but the entry and the state that earlier entries made (no clock, no
locale, no randomness, no order of a dict that was filled from outside).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import pyarrow as pa

from marble.errors import ERROR_CODES, CorruptionError, InvariantError, MarbleError
from marble.types import INDEX_MAX


@dataclass(frozen=True, slots=True)
class Result:
    """What applying one entry gave: the same on every replica.

    Either ``error_code`` is None and ``value`` is the answer (rows affected, or a table's id), or it is one of
    `marble.errors.ERROR_CODES` and ``message`` says what was wrong.
    """

    value: int = 0
    error_code: str | None = None
    message: str = ""
    index: int = 0
    """Not 0: the entry repeats one of its session, and this is the answer that the first, at ``index``, got."""

    def raise_for_error(self) -> int:
        """Return ``value``, or raise the error that this result stands for."""
        if self.error_code is not None:
            error: type[MarbleError] = ERROR_CODES.get(self.error_code, InvariantError)
            raise error(self.message)
        return self.value


SNAPSHOT_SCHEMA: Final = pa.schema(
    [
        pa.field("section", pa.string(), nullable=False),
        pa.field("table", pa.uint32(), nullable=False),
        pa.field("payload", pa.binary(), nullable=False),
    ]
)
"""A machine's state on its way to a file: pieces in an order that the machine decides. ``section`` says what a piece is."""

FILES: Final = "files"
"""The section that names files which belong to the state: its payload holds rows of `FILES_SCHEMA`. All others mean nothing
to anybody but the machine."""

FILES_SCHEMA: Final = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("nbytes", pa.uint64(), nullable=False),
        pa.field("level", pa.uint32(), nullable=False),
        pa.field("rows", pa.uint64(), nullable=False),
        pa.field("tombstones", pa.uint64(), nullable=False),
        pa.field("first_key", pa.binary(), nullable=False),
        pa.field("last_key", pa.binary(), nullable=False),
        pa.field("first_index", pa.uint64(), nullable=False),
        pa.field("last_index", pa.uint64(), nullable=False),
        pa.field("ttl_min", pa.int64()),
        pa.field("ttl_max", pa.int64()),
    ]
)
"""One row is one file. Whoever moves, counts or removes files looks at ``name`` and ``nbytes`` and nothing else."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file that a state consists of, besides its rows: named by its content, never changed.

    - ``name``: the XXH3-128 of the file as 32 hexadecimal digits; equal names are equal bytes.
    - ``nbytes``: its length.
    """

    name: str
    nbytes: int

    @property
    def checksum(self) -> int:
        """The name as a number: what the XXH3-128 of the bytes must be."""
        return int(self.name, 16)

    @property
    def key(self) -> int:
        """The lower 63 bits of that, which say in a message which file is meant; never 0."""
        return file_key(self.name)


def file_key(name: str) -> int:
    """See `FileRef.key`."""
    return int(name, 16) & INDEX_MAX or 1


Pace = Callable[[int], None]
"""Called with the bytes that were written and synced; may wait, and may raise to give up."""


class MachineState(Protocol):
    """The state of a machine at one index. Never changes; costs no copy of the rows to make.

    As long as somebody holds it, no file that it consists of is removed.
    """

    @property
    def applied_index(self) -> int: ...

    def batches(self, pace: Pace | None = None) -> Iterator[pa.RecordBatch]:
        """The whole state (schema `SNAPSHOT_SCHEMA`), some MiB at a time, made while it is asked for. Once, on any thread.

        What belongs into files is written and durable before the first piece comes. `pace` is for these.
        """
        ...

    def files(self) -> Sequence[FileRef]:
        """The files that the pieces given out by `batches` so far refer to."""
        ...


class StateMachine(Protocol):
    """What the log drives. `apply`, `capture` and `restore` run on one thread; readers may be many."""

    @property
    def applied_index(self) -> int:
        """Index of the last entry applied; 0 before the first."""
        ...

    def apply(self, entries: pa.RecordBatch) -> Sequence[Result]:
        """Apply the rows of `entries` (schema `marble._core.entry_batch.ENTRY_SCHEMA`), which follow `applied_index`.

        Returns one Result for each row. A row whose content is wrong gives an error Result and changes nothing.
        An exception means that this replica cannot go on.
        """
        ...

    def capture(self) -> MachineState:
        """The state as of `applied_index`, to be written while this machine goes on."""
        ...

    def restore(self, index: int, batches: Iterable[pa.RecordBatch]) -> None:
        """Replace the whole state by what a `MachineState` at `index` gave out. Readers see the old state or the new one.

        Raises CorruptionError if that cannot be; the old state then stays.
        """
        ...


@runtime_checkable
class StoredMachine(StateMachine, Protocol):
    """A state machine that keeps its state in files."""

    @property
    def memory_bytes(self) -> int:
        """About how much is in memory only: what a capture would have to write. Any thread."""
        ...

    @property
    def backlog_bytes(self) -> int:
        """How far files lag behind: what waits to be written, and what waits to be compacted. Any thread."""
        ...

    @property
    def compaction_due(self) -> bool:
        """Whether `compact` may find something to do. Any thread."""
        ...

    def compact(self, pace: Pace | None = None) -> bool:
        """Make the files fewer, or let some go, by one step; the content stays as it is. On any one thread at a time.

        Returns
        -------
        bool
            Whether there was anything to do.

        Raises
        ------
        OSError
            The disk failed or is full. All is as before.
        CorruptionError
            A file is damaged. All is as before, and this file is left alone from now on.
        """
        ...

    def collect(self, kept: Callable[[], Collection[str]]) -> int:
        """Remove the files that neither are named by `kept` nor part of the state or of one that somebody holds.

        `kept` is called at most once. Not while a snapshot is written or received elsewhere: the files of one of which `kept`
        does not know yet would go.

        Returns
        -------
        int
            Bytes given back.
        """
        ...


@runtime_checkable
class HealingMachine(Protocol):
    """A machine that can go on when some of its files are damaged or missing.

    A read that needs such a file raises CorruptionError with the file's path; it never gives a wrong answer. All else goes
    on. `apply` cannot do without what it needs of such a file: it raises the same error, and goes on where it ended when it is
    called again with the same entries.
    """

    @property
    def applied_index(self) -> int:
        """See `StateMachine`. After a call of `apply` that ended half way it may be beyond what that call had answered."""
        ...

    def salvage(self, index: int, batches: Iterable[pa.RecordBatch]) -> None:
        """As `StateMachine.restore`, also if files are missing or damaged: these are `damaged` then."""
        ...

    def rebuild(self, index: int, batches: Iterable[pa.RecordBatch], entries: Iterable[pa.RecordBatch]) -> None:
        """Replace the whole state by what a `MachineState` at `index` gave out, brought forward by `entries`, which follow it.

        `entries` end at `applied_index`, and were applied here before: nobody is told of them again. There are none if `index` is
        not below it. Readers see the old state or the new one. On the thread of `apply`.

        Raises CorruptionError if that cannot be; the old state then stays.
        """
        ...

    def blame(self, error: CorruptionError) -> bool:
        """Whether `error` is about a file of this machine. If it is damaged indeed, it is `damaged` from now on. Any thread."""
        ...

    def scrub(self, after: str, pace: Pace | None = None) -> tuple[str, int, CorruptionError | None]:
        """Read the file that comes after `after` in the order of names, and check all of it. Beside everything but `compact`.

        Returns
        -------
        str, int, CorruptionError or None
            Its name, "" if `after` was the last; how many files there are; what is wrong with it, which is known from now on.
        """
        ...

    def live(self) -> Sequence[FileRef]:
        """The files that the present state consists of. Any thread."""
        ...

    def damaged(self) -> Sequence[FileRef]:
        """The files of the present state that were found damaged or missing and are not healed yet. Any thread, often."""
        ...

    def healed(self, name: str) -> None:
        """The file with this name, damaged until now or not, is there and sound: use it. Any thread. CorruptionError if it is not so."""
        ...
