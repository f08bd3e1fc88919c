"""What `fault_of` says is what pyarrow says."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from marble._core.validity import fault_of
from marble.errors import UsageError

LONG = 40_000
"""Rows enough for the GIL to be given back."""


def broken(rows: int) -> list[pa.RecordBatch]:
    texts = pa.array([b"\xff"] * rows, pa.binary()).view(pa.string())
    indexes = pa.DictionaryArray.from_arrays(pa.array([7] * rows, pa.int8()), pa.array(["a"]), safe=False)
    falling = pa.py_buffer(np.array([0, 1] + [0] * (rows - 1), np.int32))
    lists = pa.Array.from_buffers(pa.list_(pa.int8()), rows, [None, falling], children=[pa.array([1], pa.int8())])
    return [pa.record_batch([array], ["a"]) for array in (texts, indexes, *([lists] if rows > 1 else []))]


@pytest.mark.parametrize("rows", [1, LONG])
def test_faults_are_those_that_pyarrow_finds(rows: int) -> None:
    for batch in broken(rows):
        with pytest.raises(pa.ArrowInvalid) as error:
            batch.validate(full=True)
        assert fault_of(batch) == str(error.value)


@pytest.mark.parametrize("rows", [0, 1, LONG])
def test_a_sound_batch_has_none(rows: int) -> None:
    assert fault_of(pa.record_batch({"a": ["x"] * rows, "b": [None] * rows})) == ""
    assert fault_of(pa.record_batch({"a": ["x"] * (rows + 2)}).slice(1, rows)) == ""


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a pyarrow\.RecordBatch, got Table"):
        fault_of(pa.table({"a": [1]}))  # type: ignore[arg-type]
