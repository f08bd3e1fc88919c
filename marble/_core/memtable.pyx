# distutils: language = c++
"""The rows of one table in memory: the face of ``memtable.hpp`` and what it includes, where layout and rules stand.

Ownership: a Memtable, a Snapshot and a Scan each share C++ objects that keep alive whatever they read, so each may
outlive the others.
Thread safety: every call releases the GIL for its work. Snapshots are immutable; writes, and steps of one scan, take
turns.
Invariants: each object holds its C++ object from ``__cinit__`` or from the only function that makes it, and for good.
"""
cimport cython
from libc.stdint cimport int64_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector
from marble._core.arrow_face cimport batch_of, import_pyarrow, raise_status, schema_of
from marble._core.arrow_face cimport wrap_array, wrap_batch, wrap_schema
from marble._core.scan_face cimport CMergeCursor, CScanBatch, CScanOptions, make_scan, scan_options
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CArray, CRecordBatch, CSchema

from marble.errors import UsageError

import_pyarrow()

# Known inside of this module only: without it no object is made whose C++ part is missing.
cdef object _MAKER = object()


cdef extern from "memtable.hpp" namespace "marble" nogil:
    cdef cppclass CMemtable "marble::MemtableCore":
        CLayout& layout() noexcept
        shared_ptr[CState] Take() noexcept
        CStatus Upsert(const CRecordBatch& batch, uint64_t index) noexcept
        CStatus Delete(const CRecordBatch& keys, uint64_t index, int64_t* deleted) noexcept

    CStatus make_memtable "marble::MemtableCore::Make"(
        shared_ptr[CSchema] schema, const vector[string]& key, cbool keep_tombstones,
        shared_ptr[CMemtable]* out) noexcept


@cython.final
cdef class Memtable:
    cdef shared_ptr[CMemtable] table

    def __cinit__(self, schema, key, cbool keep_tombstones=False):
        cdef shared_ptr[CSchema] c_schema
        cdef vector[string] names
        schema_of(schema, &c_schema)
        if isinstance(key, (str, bytes)):
            raise UsageError(f"the key is a sequence of column names, got {key!r}: write [{key!r}]")
        for name in key:
            if not isinstance(name, str):
                raise UsageError(f"the key is a sequence of column names, got {name!r} in it")
            names.push_back(name.encode())
        raise_status(make_memtable(c_schema, names, keep_tombstones, &self.table))

    @property
    def schema(self):
        return wrap_schema(self.table.get().layout().schema)

    @property
    def key(self):
        return tuple(self.key_schema.names)

    @property
    def key_schema(self):
        return wrap_schema(self.table.get().layout().codec.get().schema())

    @property
    def get_schema(self):
        return wrap_schema(self.table.get().layout().get_schema)

    def upsert(self, batch, uint64_t index):
        cdef shared_ptr[CRecordBatch] c_batch
        cdef CStatus status
        batch_of(batch, &c_batch)
        with nogil:
            status = self.table.get().Upsert(c_batch.get()[0], index)
        raise_status(status)
        return c_batch.get().num_rows()

    def delete(self, keys, uint64_t index):
        cdef shared_ptr[CRecordBatch] c_keys
        cdef CStatus status
        cdef int64_t deleted = 0
        batch_of(keys, &c_keys)
        with nogil:
            status = self.table.get().Delete(c_keys.get()[0], index, &deleted)
        raise_status(status)
        return deleted

    def snapshot(self):
        cdef Snapshot snapshot = Snapshot.__new__(Snapshot, _MAKER)
        snapshot.state = self.table.get().Take()
        return snapshot


@cython.final
cdef class Snapshot:
    def __cinit__(self, maker=None):
        if maker is not _MAKER:
            raise TypeError("a Snapshot comes from Memtable.snapshot")

    @property
    def schema(self):
        return wrap_schema(self.state.get().layout.get().schema)

    @property
    def index(self):
        return self.state.get().index

    @property
    def run_count(self):
        return self.state.get().runs.size()

    @property
    def row_count(self):
        cdef CStatus status
        cdef int64_t rows = 0
        with nogil:
            status = self.state.get().CountRows(&rows)
        raise_status(status)
        return rows

    @property
    def entry_count(self):
        return self.state.get().CountEntries()

    @property
    def bytes_about(self):
        return self.state.get().AboutBytes()

    @property
    def nbytes(self):
        cdef CStatus status
        cdef uint64_t total = 0
        with nogil:
            status = self.state.get().CountBytes(&total)
        raise_status(status)
        return total

    def get_many(self, keys):
        cdef shared_ptr[CRecordBatch] c_keys
        cdef shared_ptr[CRecordBatch] rows
        cdef shared_ptr[CArray] found
        cdef CStatus status
        batch_of(keys, &c_keys)
        with nogil:
            status = self.state.get().GetMany(c_keys.get()[0], &rows, &found)
        raise_status(status)
        return wrap_batch(rows), wrap_array(found)

    def scan(self, batch_rows_max=65536, columns=None, lower=None, upper=None, *, reverse=False, limit=None):
        cdef CScanOptions options
        cdef Scan scan = Scan.__new__(Scan, _MAKER)
        scan_options(&options, self.schema, batch_rows_max, columns, lower, upper, reverse, limit)
        raise_status(make_scan(self.state, options, &scan.cursor))
        return scan


@cython.final
cdef class Scan:
    cdef shared_ptr[CMergeCursor] cursor

    def __cinit__(self, maker=None):
        if maker is not _MAKER:
            raise TypeError("a Scan comes from Snapshot.scan")

    @property
    def schema(self):
        return wrap_schema(self.cursor.get().schema())

    def close(self):
        with nogil:
            self.cursor.get().Close()

    def __iter__(self):
        return self

    def __next__(self):
        cdef CScanBatch batch
        cdef CStatus status
        with nogil:
            status = self.cursor.get().Next(&batch)
        raise_status(status)
        if batch.rows.get() == NULL:
            raise StopIteration
        return wrap_batch(batch.rows)
