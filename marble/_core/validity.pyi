"""Whether a batch keeps Arrow's own promises. Layout, ownership and invariants: head of ``validity.pyx``."""

import pyarrow as pa

def fault_of(batch: pa.RecordBatch) -> str:
    """What is wrong with `batch`, in Arrow's words; empty if nothing is.

    Looked for are wrong lengths and offsets, text that is not UTF-8, dictionary indexes without a value, decimals that are
    too long, as by ``pyarrow.RecordBatch.validate(full=True)``.

    Raises
    ------
    UsageError
        It is not a batch.
    """
