# distutils: language = c++
"""Memtables and files of one table read as one: the face of ``lsm.hpp`` and what it includes, where the rules stand.

Ownership: a Reader and what it makes share C++ objects that keep alive whatever they read; files may be deleted while
their mappings are in use.
Thread safety: every call releases the GIL for its work. Readers are immutable; steps of one scan take turns.
Invariants: each object holds its C++ object from ``__cinit__`` or from the only function that makes it, and for good.
"""
cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.utility cimport move
from libcpp.vector cimport vector
from marble._core.arrow_face cimport CResult, batch_of, import_pyarrow, raise_status
from marble._core.arrow_face cimport wrap_array, wrap_batch, wrap_schema
from marble._core.memtable cimport CKeyCodec, CLayout, CState, Snapshot
from marble._core.scan_face cimport CMergeCursor, CScanBatch, CScanOptions, column_numbers, scan_options
from marble._core.sstable cimport CTableFile, SSTable, raise_read_status
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CArray, CArrayData, CBuffer, CDataType, CRecordBatch, CScalar, CSchema

import pyarrow as pa

from marble.errors import UsageError, check

import_pyarrow()

# Known inside of this module only: without it no object is made whose C++ part is missing.
cdef object _MAKER = object()

ctypedef vector[shared_ptr[CTableFile]] Files
ctypedef vector[shared_ptr[CBuffer]] Bitmaps


cdef extern from "arrow/python/pyarrow.h" namespace "arrow::py":
    CResult[shared_ptr[CBuffer]] unwrap_buffer(object buffer)
    object wrap_scalar(const shared_ptr[CScalar]& scalar)


cdef extern from "point.hpp" namespace "marble":
    cdef cppclass CSource "const marble::Source":
        vector[shared_ptr[CArrayData]] columns

    cdef cppclass CPointHit "marble::PointHit":
        CSource* source
        uint32_t row

    cbool encode_key "marble::EncodeKey"(const CKeyCodec& codec, object values, string* key) except +
    PyObject* point_value "marble::PointValue"(
        const CDataType& type, CSource& source, int column, uint32_t row) except? NULL


cdef extern from "arrow/array/util.h" namespace "arrow" nogil:
    shared_ptr[CArray] make_array "arrow::MakeArray"(const shared_ptr[CArrayData]& data)


cdef extern from "lsm.hpp" namespace "marble" nogil:
    cdef cppclass CLsmReader "const marble::LsmReader":
        const shared_ptr[CLayout]& layout() noexcept
        CStatus GetMany(
            const CRecordBatch& keys, const vector[int]& columns, shared_ptr[CRecordBatch]* out,
            shared_ptr[CArray]* found) noexcept
        CStatus Scan(CScanOptions options, vector[Bitmaps] wanted, shared_ptr[CMergeCursor]* out) noexcept
        CStatus CountRows(CScanOptions options, uint64_t* out) noexcept
        cbool FindInMemory(const string& key, CPointHit* out) noexcept
        cbool has_files() noexcept
        CStatus FindInFiles(const string& key, CPointHit* out) noexcept
        CStatus WithStates(vector[shared_ptr[CState]] states, shared_ptr[CLsmReader]* out) noexcept

    CStatus make_reader "marble::LsmReader::Make"(
        vector[shared_ptr[CState]] states, vector[Files] levels, shared_ptr[CLsmReader]* out) noexcept


cdef extern from "conjuncts.hpp" namespace "marble" nogil:
    cdef cppclass CConjunct "marble::Conjunct":
        string column
        string op
        shared_ptr[CScalar] value
        shared_ptr[CArray] values

    CStatus find_conjuncts "marble::ConjunctFinder::Find"(shared_ptr[CBuffer] filter, vector[CConjunct]* out) noexcept


def conjuncts(filter):
    cdef vector[CConjunct] found
    cdef CStatus status
    _, (data,) = filter.__reduce__()
    check(isinstance(data, pa.Buffer), "pyarrow pickles an expression in a way that this marble does not know")
    cdef shared_ptr[CBuffer] buffer = unwrap_buffer(data).ValueOrDie()
    with nogil:
        status = find_conjuncts(buffer, &found)
    raise_status(status)
    result = []
    for conjunct in found:
        value = wrap_array(conjunct.values) if conjunct.value.get() == NULL else wrap_scalar(conjunct.value)
        result.append((conjunct.column.decode(), conjunct.op.decode(), value))
    return result


cdef int states_of(tuple snapshots, vector[shared_ptr[CState]]* out) except -1:
    for snapshot in snapshots:
        if not isinstance(snapshot, Snapshot):
            raise UsageError(f"expected a Snapshot, got {type(snapshot).__name__}")
        out.push_back((<Snapshot>snapshot).state)
    return 0


@cython.final
cdef class Reader:
    cdef shared_ptr[CLsmReader] reader
    cdef readonly tuple memtables
    cdef readonly tuple files

    def __cinit__(self, memtables, files=(), *, maker=None):
        cdef vector[shared_ptr[CState]] states
        cdef vector[Files] levels
        self.memtables = tuple(memtables)
        if maker is _MAKER:
            self.files = files
            return
        # A level without files is no level.
        self.files = tuple(filter(None, map(tuple, files)))
        states_of(self.memtables, &states)
        for level in self.files:
            levels.push_back(Files())
            for file in level:
                if not isinstance(file, SSTable):
                    raise UsageError(f"expected an SSTable, got {type(file).__name__}")
                levels.back().push_back((<SSTable>file).file)
        raise_status(make_reader(move(states), move(levels), &self.reader))

    def with_memtables(self, memtables):
        cdef vector[shared_ptr[CState]] states
        cdef Reader other = Reader.__new__(Reader, memtables, self.files, maker=_MAKER)
        states_of(other.memtables, &states)
        raise_status(self.reader.get().WithStates(move(states), &other.reader))
        return other

    @property
    def schema(self):
        return wrap_schema(self.reader.get().layout().get().schema)

    @property
    def key_schema(self):
        return wrap_schema(self.reader.get().layout().get().codec.get().schema())

    @property
    def get_schema(self):
        return wrap_schema(self.reader.get().layout().get().get_schema)

    @property
    def row_count(self):
        return self.count_rows()

    def count_rows(self, lower=None, upper=None):
        cdef CScanOptions options
        cdef CStatus status
        cdef uint64_t rows = 0
        scan_options(&options, self.schema, 65536, (), lower, upper, False, None)
        with nogil:
            status = self.reader.get().CountRows(options, &rows)
        raise_read_status(status)
        return rows

    def get_many(self, keys, columns=None):
        cdef shared_ptr[CRecordBatch] c_keys
        cdef shared_ptr[CRecordBatch] rows
        cdef shared_ptr[CArray] found
        cdef vector[int] numbers
        cdef CStatus status
        batch_of(keys, &c_keys)
        column_numbers(self.schema, columns, &numbers)
        with nogil:
            status = self.reader.get().GetMany(c_keys.get()[0], numbers, &rows, &found)
        raise_read_status(status)
        return wrap_batch(rows), wrap_array(found)

    def get_row(self, tuple names, tuple key):
        cdef CPointHit hit
        cdef CStatus status
        cdef string encoded
        cdef PyObject* value
        cdef int column, position
        cdef CLayout* layout = self.reader.get().layout().get()
        if not encode_key(layout.codec.get()[0], key, &encoded):
            return False
        # The memtables answer sooner than the GIL is given back and fetched again. A file may keep its reader waiting.
        if not self.reader.get().FindInMemory(encoded, &hit) and self.reader.get().has_files():
            with nogil:
                status = self.reader.get().FindInFiles(encoded, &hit)
            raise_read_status(status)
        if hit.source == NULL:
            return None
        if len(names) != layout.schema.get().num_fields():
            raise UsageError(f"the table has {layout.schema.get().num_fields()} columns, got {len(names)} names")
        row = {}
        for column in range(<int>len(names)):
            position = layout.PositionInKey(column)
            if position >= 0:
                row[names[column]] = key[position]
                continue
            value = point_value(layout.schema.get().field(column).get().type().get()[0], hit.source[0], column, hit.row)
            if value == NULL:
                row[names[column]] = wrap_array(make_array(hit.source.columns[column]))[hit.row].as_py()
            else:
                row[names[column]] = <object>value
                Py_DECREF(<object>value)
        return row

    cdef int look_at_zones(self, object may_match, bytes lower, bytes upper, vector[Bitmaps]* wanted) except -1:
        """Ask `may_match` of each file in the bounds which of its blocks a scan must read."""
        cdef Bitmaps bitmaps
        for level in self.files:
            bitmaps.clear()
            for file in level:
                info = file.info
                if (upper is not None and info.first_key >= upper) or (lower is not None and info.last_key < lower):
                    bitmaps.push_back(shared_ptr[CBuffer]())
                    continue
                zones = file.zone_maps()
                mask = may_match(zones)
                check(len(mask) == zones.num_rows, "a zone predicate has an answer for each block")
                # Anew, so that its bits begin with a byte; what is not known may match.
                mask = pa.array([bit is not False for bit in mask.to_pylist()], pa.bool_())
                bitmaps.push_back(unwrap_buffer(mask.buffers()[1]).ValueOrDie())
            wanted.push_back(bitmaps)
        return 0

    def scan(
        self, batch_rows_max=65536, columns=None, lower=None, upper=None, *, reverse=False, limit=None, may_match=None,
        batch_bytes_max=None
    ):
        cdef CScanOptions options
        cdef vector[Bitmaps] wanted
        cdef CStatus status
        cdef Scan scan = Scan.__new__(Scan, _MAKER)
        scan_options(&options, self.schema, batch_rows_max, columns, lower, upper, reverse, limit)
        if batch_bytes_max is not None:
            if batch_bytes_max < 1:
                raise UsageError(f"batch_bytes_max must be at least 1, got {batch_bytes_max}")
            options.batch_bytes_max = batch_bytes_max
        if may_match is not None:
            self.look_at_zones(may_match, lower, upper, &wanted)
        with nogil:
            status = self.reader.get().Scan(options, wanted, &scan.cursor)
        raise_read_status(status)
        return scan

    def scan_versions(self, batch_rows_max=65536, lower=None, upper=None, *, drop_tombstones=False):
        cdef CScanOptions options
        cdef vector[Bitmaps] wanted
        cdef CStatus status
        cdef VersionScan scan = VersionScan.__new__(VersionScan, _MAKER)
        scan_options(&options, self.schema, batch_rows_max, None, lower, upper, False, None)
        options.versions = True
        options.drop_tombstones = bool(drop_tombstones)
        with nogil:
            status = self.reader.get().Scan(options, wanted, &scan.cursor)
        raise_read_status(status)
        return scan


cdef class _Cursor:
    """What all scans of a Reader have in common."""
    cdef shared_ptr[CMergeCursor] cursor

    def __cinit__(self, maker=None):
        if maker is not _MAKER:
            raise TypeError(f"a {type(self).__name__} comes from a Reader")

    @property
    def schema(self):
        return wrap_schema(self.cursor.get().schema())

    def close(self):
        with nogil:
            self.cursor.get().Close()

    def __iter__(self):
        return self

    cdef int read(self, CScanBatch* batch) except -1:
        cdef CStatus status
        with nogil:
            status = self.cursor.get().Next(batch)
        raise_read_status(status)
        if batch.rows.get() == NULL:
            raise StopIteration
        return 0


@cython.final
cdef class Scan(_Cursor):
    def __next__(self):
        cdef CScanBatch batch
        self.read(&batch)
        return wrap_batch(batch.rows)


@cython.final
cdef class VersionScan(_Cursor):
    def __next__(self):
        cdef CScanBatch batch
        self.read(&batch)
        return wrap_batch(batch.rows), wrap_array(batch.indexes), wrap_array(batch.deleted)
