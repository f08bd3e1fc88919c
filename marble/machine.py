"""The seam between the ordered log and what it drives: the replicated state machine.

The driver calls `StateMachine.apply` with committed entries, in order, each exactly once per life of the machine.
Apply must be deterministic: it may use nothing but the entry and the state that earlier entries made (no clock, no
locale, no randomness, no order of a dict that was filled from outside).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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

    def raise_for_error(self) -> int:
        """Return ``value``, or raise the error that this result stands for."""
        if self.error_code is not None:
            error: type[MarbleError] = ERROR_CODES.get(self.error_code, InvariantError)
            raise error(self.message)
        return self.value


class StateMachine(Protocol):
    """What the log drives. `apply` runs on one thread; readers may be many."""

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
