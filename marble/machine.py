"""The seam between the ordered log and what it drives: the replicated state machine.

The driver calls `StateMachine.apply` with committed entries, in order, each exactly once per life of the machine.
Apply must be deterministic: it may use nothing but the entry and the state that earlier entries made (no clock, no
locale, no randomness, no order of a dict that was filled from outside).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import pyarrow as pa

from marble.errors import ERROR_CODES, InvariantError, MarbleError


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


class MachineState(Protocol):
    """The state of a machine at one index. Never changes; costs no copy of the rows to make."""

    @property
    def applied_index(self) -> int: ...

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The whole state (schema `SNAPSHOT_SCHEMA`), some MiB at a time, made while it is asked for. Once, on any thread."""
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
