"""Scans as Python asks for them: what the Cython modules share that walk memtables and files.

Errors: UsageError for a scan that does not fit its table.
"""
from libc.stdint cimport uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector
from marble._core.memtable cimport CState
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CArray, CRecordBatch, CSchema


cdef extern from "merge_cursor.hpp" namespace "marble" nogil:
    cdef cppclass CScanOptions "marble::ScanOptions":
        vector[int] columns
        uint64_t batch_rows_max
        uint64_t batch_bytes_max
        string lower
        cbool has_upper
        string upper
        cbool reverse
        uint64_t limit
        cbool versions
        cbool drop_tombstones

    cdef cppclass CScanBatch "marble::ScanBatch":
        shared_ptr[CRecordBatch] rows
        shared_ptr[CArray] indexes
        shared_ptr[CArray] deleted

    cdef cppclass CMergeCursor "marble::MergeCursor":
        const shared_ptr[CSchema]& schema() noexcept
        CStatus Next(CScanBatch* out) noexcept
        void Close() noexcept

    CStatus make_scan "marble::MakeScan"(
        shared_ptr[CState] state, CScanOptions options, shared_ptr[CMergeCursor]* out) noexcept


cdef inline int refuse(str message) except -1:
    """Raise a UsageError. It is imported only then: every scan comes by here."""
    from marble.errors import UsageError

    raise UsageError(message)


cdef inline int column_numbers(object schema, object columns, vector[int]* out) except -1:
    """Look names of columns up; None stands for all."""
    names = schema.names
    if isinstance(columns, (str, bytes)):
        refuse(f"columns is a sequence of names, got {columns!r}: write [{columns!r}]")
    wanted = names if columns is None else list(columns)
    for name in wanted:
        if name not in names:
            refuse(f"column {name!r} is not in the table; its columns are {names}")
        out.push_back(names.index(name))
    if len(set(wanted)) != len(wanted):
        refuse(f"a column is named twice in {wanted}")
    return 0


cdef inline int scan_options(
    CScanOptions* out, object schema, object batch_rows_max, object columns, object lower, object upper,
    object reverse, object limit
) except -1:
    """Check what a scan was asked for, and put it down for C++."""
    if batch_rows_max < 1:
        refuse(f"batch_rows_max must be at least 1, got {batch_rows_max}")
    if limit is not None and limit < 0:
        refuse(f"limit must be at least 0, got {limit}")
    for name, bound in (("lower", lower), ("upper", upper)):
        if bound is not None and not isinstance(bound, bytes):
            refuse(f"{name} is an encoded key, bytes, or None, got {bound!r}")
    column_numbers(schema, columns, &out.columns)
    out.batch_rows_max = batch_rows_max
    if lower is not None:
        out.lower = lower
    if upper is not None:
        out.has_upper = True
        out.upper = upper
    out.reverse = bool(reverse)
    if limit is not None:
        out.limit = limit
    return 0
