"""What is asked of tables, in the words that a backend, a node and the wire share.

Rule 1: these are values; they do nothing, and nobody has vouched for what is in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from marble.schema import TableInfo
from marble.types import EntryKind


@dataclass(frozen=True, slots=True, eq=False)
class ScanRequest:
    """Which rows of a table are wanted, and of which of its states.

    Attributes
    ----------
    columns
        Names of columns, in the order wanted. None: all.
    filter
        Only rows for which it is true.
    lower, upper
        Only rows with ``lower <= key < upper``, encoded as `marble._core.key_codec.KeyCodec` does. None: no bound.
    reverse
        From the largest key down.
    limit
        At most so many rows.
    at_index
        The state after this entry of the log. None: the present one.
    consistency
        How present: see `marble.database.Consistency`.
    """

    columns: tuple[str, ...] | None = None
    filter: pc.Expression | None = None
    lower: bytes | None = None
    upper: bytes | None = None
    reverse: bool = False
    limit: int | None = None
    at_index: int | None = None
    consistency: str = "linearizable"


@dataclass(frozen=True, slots=True, eq=False)
class TableChange:
    """One change of one table.

    Attributes
    ----------
    kind
        WRITE, DELETE or DELETE_RANGE.
    batch
        Rows of the table's schema, or keys of its key schema; None for a range.
    lower, upper
        The range: ``lower <= key < upper``, encoded; None is no bound.
    """

    kind: EntryKind
    table: TableInfo
    batch: pa.RecordBatch | None = None
    lower: bytes | None = None
    upper: bytes | None = None
