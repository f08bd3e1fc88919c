# distutils: language = c++
"""Whether a batch keeps Arrow's own promises, which nothing that reads it checks again.

Layout: none of its own. Ownership: the batch is the caller's. Thread safety: pure.
Invariants: the answer is that of ``pyarrow.RecordBatch.validate(full=True)``, which gives the GIL back even for one row; here
that happens only where it pays (``gil.hpp``).
"""
from cpython.pystate cimport PyThreadState
from libc.stdint cimport int64_t
from libcpp.memory cimport shared_ptr
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CRecordBatch

from marble._core.arrow_face cimport batch_of, import_pyarrow
from marble._core.gil cimport release_gil, take_gil


cdef extern from "arrow/util/byte_size.h" namespace "arrow::util" nogil:
    int64_t TotalBufferSize(const CRecordBatch& batch)


import_pyarrow()


def fault_of(batch):
    """What is wrong with `batch`, in Arrow's words; empty if nothing is."""
    cdef shared_ptr[CRecordBatch] value
    cdef CStatus status
    batch_of(batch, &value)
    cdef PyThreadState* released = release_gil(TotalBufferSize(value.get()[0]))
    status = value.get().ValidateFull()
    take_gil(released)
    return "" if status.ok() else status.message().decode("utf-8", "replace")
