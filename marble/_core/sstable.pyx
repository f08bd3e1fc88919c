# distutils: language = c++
"""Sorted tables in files: the face of ``sstable.hpp``, ``sstable_writer.hpp`` and ``sstable_read.hpp``, where layout and
rules stand. docs/lsm.md describes the file.

Ownership: a file shares its buffer and its cache, a scan shares its file; batches share the buffer. Each may outlive the
others. Freeing the buffer may take the GIL, and so no lock is held then.
Thread safety: an SSTable and a BlockCache may be used by any number of threads at once, and release the GIL for their
work; steps of one scan take turns. A writer belongs to one thread at a time: a second one is refused.
Invariants: each object holds its C++ object from ``__cinit__`` or from the only function that makes it, and for good.
"""
cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport make_shared, shared_ptr
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector
from marble._core.arrow_face cimport batch_of, import_pyarrow, raise_status, schema_of
from marble._core.arrow_face cimport wrap_array, wrap_batch, wrap_schema
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CArray, CBuffer, CRecordBatch, CSchema

from typing import NamedTuple

from marble.errors import CorruptionError, UsageError

import_pyarrow()

# Known inside of this module only: without it no object is made whose C++ part is missing.
cdef object _MAKER = object()


cdef extern from "arrow/python/pyarrow.h" namespace "arrow" nogil:
    cdef cppclass CResultBuffer "arrow::Result<std::shared_ptr<arrow::Buffer>>":
        shared_ptr[CBuffer] ValueOrDie()

    cdef cppclass CResultArray "arrow::Result<std::shared_ptr<arrow::Array>>":
        shared_ptr[CArray] ValueOrDie()


cdef extern from "arrow/python/pyarrow.h" namespace "arrow::py":
    cbool is_buffer(object buffer)
    cbool is_array(object array)
    CResultBuffer unwrap_buffer(object buffer)
    CResultArray unwrap_array(object array)
    object wrap_buffer(const shared_ptr[CBuffer]& buffer)


cdef extern from "sstable_writer.hpp" namespace "marble" nogil:
    cdef cppclass CWriterOptions "marble::WriterOptions":
        int64_t block_rows_max, block_bytes_max
        string compression, ttl_column

    cdef cppclass CFileSummary "marble::FileSummary":
        CIndexHead head
        string name
        uint64_t bytes
        string first_key, last_key

    cdef cppclass CTableWriter "marble::TableWriter":
        const shared_ptr[CSchema]& schema() noexcept
        uint64_t nbytes() noexcept
        uint64_t rows() noexcept
        CStatus Add(const CRecordBatch& batch, const CArray& indexes, const CArray* deleted,
                    vector[shared_ptr[CBuffer]]* out) noexcept
        CStatus Finish(shared_ptr[CBuffer]* out, CFileSummary* summary) noexcept

    CStatus make_writer "marble::TableWriter::Make"(
        shared_ptr[CSchema] schema, const vector[string]& key, const CWriterOptions& options,
        shared_ptr[CTableWriter]* out) noexcept


cdef extern from "sstable_read.hpp" namespace "marble" nogil:
    cdef cppclass CDamageDetail "const marble::DamageDetail":
        const string& file() noexcept
        uint64_t offset() noexcept

    CDamageDetail* DamageOf(const CStatus& status) noexcept

    CStatus make_layout "marble::Layout::Make"(
        shared_ptr[CSchema] schema, const vector[string]& key, shared_ptr[CLayout]* out) noexcept

    CStatus open_file "marble::TableFile::Open"(
        shared_ptr[CBuffer] buffer, string name, shared_ptr[CLayout] layout, shared_ptr[CBlockCache] cache,
        shared_ptr[CTableFile]* out) noexcept
    CStatus GetFromFile(const CTableFile& file, const CRecordBatch& keys, shared_ptr[CRecordBatch]* rows,
                        shared_ptr[CArray]* found, shared_ptr[CArray]* indexes) noexcept
    CStatus AskFilter(const CTableFile& file, const CRecordBatch& keys, shared_ptr[CArray]* out) noexcept

    cdef cppclass CScanOptions "marble::FileScanOptions":
        vector[int] columns
        cbool has_lower, has_upper, reverse, versions
        string lower, upper

    cdef cppclass CFileScan "marble::FileScan":
        const shared_ptr[CSchema]& schema() noexcept
        CStatus Next(shared_ptr[CRecordBatch]* out) noexcept

    CStatus make_scan "marble::FileScan::Make"(
        shared_ptr[CTableFile] file, const CScanOptions& options, shared_ptr[CFileScan]* out) noexcept


cdef extern from "residence.hpp" namespace "marble" nogil:
    uint64_t MapAhead(const CBuffer& file, uint64_t bytes_max) noexcept


class SSTableInfo(NamedTuple):
    name: str
    nbytes: int
    rows: int
    tombstones: int
    block_count: int
    first_key: bytes
    last_key: bytes
    first_index: int
    last_index: int
    ttl_min: int | None
    ttl_max: int | None


cdef int raise_read_status(const CStatus& status) except -1:
    cdef CDamageDetail* damage = DamageOf(status)
    if damage != NULL:
        name = damage.file().decode("utf-8", "replace")
        raise CorruptionError(status.message().decode("utf-8", "replace"), name or None, damage.offset())
    return raise_status(status)


cdef object describe(str name, uint64_t nbytes, const CIndexHead& head, bytes first_key, bytes last_key):
    """The SSTableInfo of a file."""
    return SSTableInfo(
        name, nbytes, head.rows, head.tombstones, head.blocks, first_key, last_key, head.first_index, head.last_index,
        head.ttl_min if head.has_ttl else None, head.ttl_max if head.has_ttl else None)


cdef bytes bytes_of(string_view text):
    return PyBytes_FromStringAndSize(text.data(), <Py_ssize_t>text.size())


cdef int names_of(key, vector[string]* names) except -1:
    if isinstance(key, (str, bytes)):
        raise UsageError(f"the key is a sequence of column names, got {key!r}: write [{key!r}]")
    for name in key:
        if not isinstance(name, str):
            raise UsageError(f"the key is a sequence of column names, got {name!r} in it")
        names.push_back(name.encode())
    return 0


cdef int array_of(object array, str what, shared_ptr[CArray]* out) except -1:
    if not is_array(array):
        raise UsageError(f"{what} must be a pyarrow.Array, got {type(array).__name__}")
    out[0] = unwrap_array(array).ValueOrDie()
    return 0


cdef class BlockCache:
    def __cinit__(self, bytes_max):
        if bytes_max < 0:
            raise UsageError(f"bytes_max must be at least 0, got {bytes_max}")
        self.cache = make_shared[CBlockCache](<uint64_t>bytes_max)

    @property
    def bytes_max(self):
        return self.cache.get().bytes_max()

    @property
    def nbytes(self):
        return self.cache.get().Count().bytes

    @property
    def block_count(self):
        return self.cache.get().Count().blocks

    @property
    def hits(self):
        return self.cache.get().Count().hits

    @property
    def misses(self):
        return self.cache.get().Count().misses


@cython.final
cdef class SSTableWriter:
    cdef shared_ptr[CTableWriter] writer
    cdef bint busy

    def __cinit__(self, schema, key, *, block_rows_max=4096, block_bytes_max=65536, compression=None, ttl_column=None):
        cdef shared_ptr[CSchema] c_schema
        cdef vector[string] names
        cdef CWriterOptions options
        schema_of(schema, &c_schema)
        names_of(key, &names)
        options.block_rows_max = block_rows_max
        options.block_bytes_max = block_bytes_max
        options.compression = (compression or "").encode()
        options.ttl_column = (ttl_column or "").encode()
        raise_status(make_writer(c_schema, names, options, &self.writer))

    @property
    def schema(self):
        return wrap_schema(self.writer.get().schema())

    @property
    def nbytes(self):
        return self.writer.get().nbytes()

    @property
    def rows(self):
        return self.writer.get().rows()

    cdef int enter(self) except -1:
        if self.busy:
            raise UsageError("a writer belongs to one thread at a time")
        self.busy = True
        return 0

    def add(self, batch, indexes, deleted=None):
        cdef shared_ptr[CRecordBatch] c_batch
        cdef shared_ptr[CArray] c_indexes
        cdef shared_ptr[CArray] c_deleted
        cdef vector[shared_ptr[CBuffer]] ready
        cdef CStatus status
        batch_of(batch, &c_batch)
        array_of(indexes, "indexes", &c_indexes)
        if deleted is not None:
            array_of(deleted, "deleted", &c_deleted)
        self.enter()
        with nogil:
            status = self.writer.get().Add(c_batch.get()[0], c_indexes.get()[0], c_deleted.get(), &ready)
        self.busy = False
        raise_status(status)
        return [wrap_buffer(buffer) for buffer in ready]

    def finish(self):
        cdef shared_ptr[CBuffer] rest
        cdef CFileSummary summary
        cdef CStatus status
        self.enter()
        with nogil:
            status = self.writer.get().Finish(&rest, &summary)
        self.busy = False
        raise_status(status)
        info = describe(summary.name.decode(), summary.bytes, summary.head, summary.first_key, summary.last_key)
        return wrap_buffer(rest), info


cdef class SSTable:
    def __cinit__(self, maker=None):
        if maker is not _MAKER:
            raise TypeError("an SSTable comes from SSTable.open")

    @staticmethod
    def open(buffer, schema, key, BlockCache cache not None, str name not None=""):
        cdef shared_ptr[CSchema] c_schema
        cdef vector[string] names
        cdef shared_ptr[CLayout] layout
        cdef shared_ptr[CBuffer] c_buffer
        cdef string c_name = name.encode()
        cdef CStatus status
        cdef SSTable table = SSTable.__new__(SSTable, _MAKER)
        if not is_buffer(buffer):
            raise UsageError(f"expected a pyarrow.Buffer, got {type(buffer).__name__}")
        c_buffer = unwrap_buffer(buffer).ValueOrDie()
        schema_of(schema, &c_schema)
        names_of(key, &names)
        raise_status(make_layout(c_schema, names, &layout))
        with nogil:
            status = open_file(c_buffer, c_name, layout, cache.cache, &table.file)
        raise_read_status(status)
        return table

    @property
    def info(self):
        cdef CTableFile* file = self.file.get()
        return describe(file.name().decode(), file.seal().size, file.head(), bytes_of(file.first_key()),
                        bytes_of(file.last_key()))

    @property
    def schema(self):
        return wrap_schema(self.file.get().layout().get().get_schema)

    def map_ahead(self, uint64_t bytes_max):
        cdef uint64_t mapped
        with nogil:
            mapped = MapAhead(self.file.get().buffer().get()[0], bytes_max)
        return mapped

    def verify(self):
        cdef string name
        cdef CStatus status
        with nogil:
            status = self.file.get().Verify(&name)
        raise_read_status(status)
        return name.decode()

    def zone_maps(self):
        cdef shared_ptr[CRecordBatch] zones
        cdef CStatus status
        if self.zones.get() == NULL:
            with nogil:
                status = self.file.get().ReadZones(&zones)
            raise_read_status(status)
            self.zones = zones  # With the GIL. Two threads may read them both; they are alike.
        return wrap_batch(self.zones)

    def may_contain(self, keys):
        cdef shared_ptr[CRecordBatch] c_keys
        cdef shared_ptr[CArray] out
        cdef CStatus status
        batch_of(keys, &c_keys)
        with nogil:
            status = AskFilter(self.file.get()[0], c_keys.get()[0], &out)
        raise_status(status)
        return wrap_array(out)

    def get_many(self, keys):
        cdef shared_ptr[CRecordBatch] c_keys
        cdef shared_ptr[CRecordBatch] rows
        cdef shared_ptr[CArray] found
        cdef shared_ptr[CArray] indexes
        cdef CStatus status
        batch_of(keys, &c_keys)
        with nogil:
            status = GetFromFile(self.file.get()[0], c_keys.get()[0], &rows, &found, &indexes)
        raise_read_status(status)
        return wrap_batch(rows), wrap_array(found), wrap_array(indexes)

    def scan(self, columns=None, lower=None, upper=None, *, reverse=False, versions=False):
        cdef CScanOptions options
        cdef SSTableScan scan = SSTableScan.__new__(SSTableScan, _MAKER)
        names = self.schema.names
        if isinstance(columns, (str, bytes)):
            raise UsageError(f"columns is a sequence of names, got {columns!r}: write [{columns!r}]")
        wanted = names if columns is None else list(columns)
        for name in wanted:
            if name not in names:
                raise UsageError(f"column {name!r} is not in the table; its columns are {names}")
            options.columns.push_back(names.index(name))
        if len(set(wanted)) != len(wanted):
            raise UsageError(f"a column is named twice in {wanted}")
        options.has_lower = lower is not None
        options.has_upper = upper is not None
        options.lower = lower or b""
        options.upper = upper or b""
        options.reverse = reverse
        options.versions = versions
        raise_status(make_scan(self.file, options, &scan.cursor))
        return scan


@cython.final
cdef class SSTableScan:
    cdef shared_ptr[CFileScan] cursor

    def __cinit__(self, maker=None):
        if maker is not _MAKER:
            raise TypeError("an SSTableScan comes from SSTable.scan")

    @property
    def schema(self):
        return wrap_schema(self.cursor.get().schema())

    def __iter__(self):
        return self

    def __next__(self):
        cdef shared_ptr[CRecordBatch] batch
        cdef CStatus status
        with nogil:
            status = self.cursor.get().Next(&batch)
        raise_read_status(status)
        if batch.get() == NULL:
            raise StopIteration
        return wrap_batch(batch)
