# distutils: language = c++
# cython: language_level=3
"""Frames: the sealed units of which a log segment is made, and the loops over the rows in them.

Layout of a frame (all of it is one encapsulated Arrow IPC message; docs/log-format.md has the bytes)::

    FF FF FF FF | int32 metadata length | flatbuffer, padded | body of a record batch, each buffer padded
    '------------------- a multiple of 64 bytes -------------'--- a multiple of 64 bytes (none in a header) ---'

The flatbuffer carries the metadata key ``marble.seal``: ``marble-seal:`` and six numbers of 16 lower-case hex digits:
length, segment, position, synced, chain, checksum. The checksum is XXH3-64 of the whole frame with its own digits as '0'.

Ownership: `encode` copies rows once, into one buffer of which both the frame and the batch it returns are slices.
`decode` copies the frame into memory of its own (64-byte aligned, so that payloads decode in place) unless told to share.
Thread safety: pure functions; the GIL is released while rows are copied and bytes are hashed.

Invariants:

1. Nothing of a frame but its prefix and its seal is interpreted before the checksum was found right.
2. No function reads beyond the buffer it is given, whatever the bytes say.
3. Every frame is a multiple of 64 bytes, and so is the offset of every payload buffer in it.
4. A batch that `check_entries` accepted can be encoded; nothing else is handed to `encode`.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.pystate cimport PyThreadState
from cpython.ref cimport Py_XDECREF
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from marble._core.gil cimport release_gil, take_gil

from marble.errors import CorruptionError, InvariantError


cdef extern from "arrow/python/pyarrow.h" namespace "arrow" nogil:
    cdef cppclass CStatus "arrow::Status":
        cbool ok()
        string ToString()
    cdef cppclass CBuffer "arrow::Buffer":
        pass
    cdef cppclass CRecordBatch "arrow::RecordBatch":
        int64_t num_rows()
    cdef cppclass CResultBatch "arrow::Result<std::shared_ptr<arrow::RecordBatch>>":
        cbool ok()
        CStatus status()
        shared_ptr[CRecordBatch] ValueOrDie()
    cdef cppclass CResultBuffer "arrow::Result<std::shared_ptr<arrow::Buffer>>":
        cbool ok()
        shared_ptr[CBuffer] ValueOrDie()


cdef extern from "arrow/python/pyarrow.h" namespace "arrow::py":
    int import_pyarrow() except -1
    CResultBatch unwrap_batch(PyObject* batch)
    PyObject* wrap_batch(const shared_ptr[CRecordBatch]& batch) except NULL
    PyObject* wrap_buffer(const shared_ptr[CBuffer]& buffer) except NULL


cdef extern from "frame.hpp" namespace "marble" nogil:
    const int64_t kAlignment
    const int64_t kMetadataBytesMax
    const int64_t kSealBytes

    cdef cppclass CSeal "marble::Seal":
        uint64_t length, segment, position, synced, chain, checksum
        int64_t metadata_bytes

    const uint8_t kHardState
    const uint8_t kSnapshot

    cdef cppclass StateRow:
        uint32_t group
        uint8_t kind
        uint64_t index, term, session, sequence

    cdef cppclass RowRange:
        shared_ptr[CRecordBatch] batch
        int64_t row, end

    cdef cppclass EntryColumns:
        const uint64_t* index
        const uint64_t* term
        const uint32_t* group
        const int32_t* offsets
        int64_t rows
        const char* Open(const CRecordBatch& batch)

    cdef cppclass CRun "marble::Run":
        uint32_t group
        uint8_t state
        int64_t row, end

    CStatus EncodeHeader(const string& format, CSeal* seal, shared_ptr[CBuffer]* out)
    CStatus EncodeFrame(const vector[StateRow]& states, const vector[RowRange]& ranges, CSeal* seal,
                        shared_ptr[CBuffer]* out, shared_ptr[CRecordBatch]* out_batch)
    int64_t CheckFrame(const uint8_t* frame, int64_t available, uint64_t segment, uint64_t position, int64_t bytes_max,
                       CSeal* seal) noexcept
    CResultBatch CopyAndDecode(const uint8_t* frame, int64_t length, int64_t metadata_bytes)
    void FindRuns(const EntryColumns& columns, vector[CRun]* runs)
    const char* CheckEntries(const EntryColumns& columns, uint32_t group, int64_t row, int64_t end) noexcept


cdef extern from "arrow/util/byte_size.h" namespace "arrow::util" nogil:
    int64_t TotalBufferSize(const CRecordBatch& batch)


import_pyarrow()

ALIGNMENT = kAlignment
METADATA_BYTES_MAX = kMetadataBytesMax
SEAL_MAGIC = b"marble-seal:"
SEAL_BYTES = kSealBytes
OVERHEAD_BYTES_MAX = 768 + 11 * 64
ROW_BYTES_MAX = 57


@cython.final
cdef class Seal:
    """What a sound frame says of itself."""

    cdef readonly uint64_t length, segment, position, synced, chain, checksum
    cdef readonly int64_t metadata_bytes

    def __repr__(self):
        return (
            f"Seal(length={self.length}, segment={self.segment}, position={self.position}, synced={self.synced}, "
            f"chain={self.chain:016x}, checksum={self.checksum:016x})"
        )


cdef object adopt(PyObject* reference):
    """The object of a new reference."""
    result = <object>reference
    Py_XDECREF(reference)
    return result


cdef shared_ptr[CRecordBatch] unwrap(batch) except *:
    cdef CResultBatch result = unwrap_batch(<PyObject*>batch)
    if not result.ok():
        raise TypeError(f"expected a pyarrow.RecordBatch, got {type(batch).__name__}")
    return result.ValueOrDie()


cdef int raise_status(const CStatus& status) except -1:
    if not status.ok():
        raise InvariantError(f"a frame cannot be made: {status.ToString().decode(errors='replace')}")
    return 0


def encode_header(str version, uint64_t segment, uint64_t chain):
    cdef CSeal seal
    cdef shared_ptr[CBuffer] out
    cdef string text = version.encode()
    seal.segment, seal.position, seal.synced, seal.chain = segment, 0, 0, chain
    raise_status(EncodeHeader(text, &seal, &out))
    return adopt(wrap_buffer(out)), seal.checksum


def encode(list hard_states, list ranges, uint64_t segment, uint64_t position, uint64_t synced, uint64_t chain,
           snapshots=()):
    cdef vector[StateRow] states
    cdef vector[RowRange] rows
    cdef StateRow state
    cdef RowRange part
    cdef CSeal seal
    cdef shared_ptr[CBuffer] out
    cdef shared_ptr[CRecordBatch] out_batch
    cdef CStatus status
    cdef int64_t nbytes = 0
    for group, term, vote, commit in hard_states:
        state.group, state.kind, state.index, state.term = group, kHardState, commit, term
        state.session, state.sequence = vote, 0
        states.push_back(state)
    for group, index, term, last in snapshots:
        state.group, state.kind, state.index, state.term = group, kSnapshot, index, term
        state.session, state.sequence = 0, last
        states.push_back(state)
    for batch, row, end in ranges:
        part.batch = unwrap(batch)
        part.row, part.end = row, end
        if not 0 <= part.row < part.end <= part.batch.get().num_rows():
            raise InvariantError(f"rows {row} to {end} of a batch of {batch.num_rows}")
        rows.push_back(part)
        nbytes += TotalBufferSize(part.batch.get()[0])
    seal.segment, seal.position, seal.synced, seal.chain = segment, position, synced, chain
    cdef PyThreadState* released = release_gil(nbytes)
    status = EncodeFrame(states, rows, &seal, &out, &out_batch)
    take_gil(released)
    raise_status(status)
    return adopt(wrap_buffer(out)), adopt(wrap_batch(out_batch)), seal.checksum


cdef class _View:
    """A buffer held for the length of a call."""

    cdef Py_buffer view

    def __cinit__(self, data):
        PyObject_GetBuffer(data, &self.view, PyBUF_SIMPLE)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


def check(data, int64_t offset, uint64_t segment, uint64_t position, int64_t bytes_max):
    cdef _View held = _View(data)
    cdef CSeal found
    cdef Seal seal
    cdef int64_t verdict
    cdef int64_t available = held.view.len - offset
    if offset < 0 or available < 0:
        raise IndexError(f"offset {offset} of {held.view.len} bytes")
    with nogil:
        verdict = CheckFrame(<const uint8_t*>held.view.buf + offset, available, segment, position, bytes_max, &found)
    if verdict > 0:
        return verdict
    if verdict < 0:
        return 0
    seal = Seal.__new__(Seal)
    seal.length, seal.segment, seal.position = found.length, found.segment, found.position
    seal.synced, seal.chain, seal.checksum = found.synced, found.chain, found.checksum
    seal.metadata_bytes = found.metadata_bytes
    return seal


def decode(data, int64_t offset, Seal seal not None):
    cdef _View held = _View(data)
    cdef int64_t length = <int64_t>seal.length
    cdef const uint8_t* frame = <const uint8_t*>held.view.buf + offset
    if offset < 0 or length > held.view.len - offset or not 0 < seal.metadata_bytes <= length:
        raise IndexError(f"a frame of {length} bytes at {offset} of {held.view.len}")
    cdef CResultBatch result = CopyAndDecode(frame, length, seal.metadata_bytes)
    if not result.ok():
        raise CorruptionError(f"a sound frame holds no batch: {result.status().ToString().decode(errors='replace')}")
    cdef shared_ptr[CRecordBatch] batch = result.ValueOrDie()
    cdef EntryColumns columns
    open_columns(batch, &columns)
    return adopt(wrap_batch(batch))


cdef int open_columns(const shared_ptr[CRecordBatch]& batch, EntryColumns* columns) except -1:
    cdef const char* problem
    cdef PyThreadState* released = release_gil(batch.get().num_rows() * 4)
    problem = columns.Open(batch.get()[0])
    take_gil(released)
    if problem != NULL:
        raise InvariantError(f"not a batch of entries: {problem.decode()}")
    return 0


def check_entries(batch, uint32_t group):
    cdef shared_ptr[CRecordBatch] rows = unwrap(batch)
    cdef EntryColumns columns
    cdef const char* problem
    open_columns(rows, &columns)
    if columns.rows == 0:
        raise InvariantError("no entries")
    cdef int64_t largest = 0, i
    cdef PyThreadState* released = release_gil(columns.rows * 32)
    problem = CheckEntries(columns, group, 0, columns.rows)
    for i in range(columns.rows):
        largest = max(largest, <int64_t>(columns.offsets[i + 1] - columns.offsets[i]))
    take_gil(released)
    if problem != NULL:
        raise InvariantError(f"entries of group {group}: {problem.decode()}")
    cdef int64_t last = columns.rows - 1
    return columns.index[0], columns.term[0], columns.term[last], <int64_t>(columns.offsets[last + 1] - columns.offsets[0]), largest


def runs(batch):
    cdef shared_ptr[CRecordBatch] rows = unwrap(batch)
    cdef EntryColumns columns
    cdef vector[CRun] found
    cdef CRun run
    cdef const char* problem
    open_columns(rows, &columns)
    with nogil:
        FindRuns(columns, &found)
    result = []
    for run in found:
        if run.state:
            result.append((run.group, run.state, run.row, run.end, columns.index[run.row]))
            continue
        problem = CheckEntries(columns, run.group, run.row, run.end)
        if problem != NULL:
            raise CorruptionError(f"entries of group {run.group}: {problem.decode()}")
        result.append((run.group, 0, run.row, run.end, columns.index[run.row]))
    return result


def terms_and_sizes(batch, int64_t row, int64_t end):
    cdef shared_ptr[CRecordBatch] rows = unwrap(batch)
    cdef EntryColumns columns
    cdef int64_t i
    open_columns(rows, &columns)
    if not 0 <= row < end <= columns.rows:
        raise IndexError(f"rows {row} to {end} of {columns.rows}")
    cdef bytes terms = PyBytes_FromStringAndSize(<const char*>(columns.term + row), (end - row) * 8)
    cdef bytes sizes = PyBytes_FromStringAndSize(NULL, (end - row) * 8)
    cdef uint64_t* out = <uint64_t*><char*>sizes
    with nogil:
        for i in range(row, end):
            out[i - row] = <uint64_t>(columns.offsets[i + 1] - columns.offsets[i])
    return terms, sizes


def clip(batch, int64_t row, int64_t end, int64_t bytes_max):
    cdef shared_ptr[CRecordBatch] rows = unwrap(batch)
    cdef EntryColumns columns
    cdef int64_t low, high, middle, limit
    open_columns(rows, &columns)
    if not 0 <= row < end <= columns.rows:
        raise IndexError(f"rows {row} to {end} of {columns.rows}")
    limit = columns.offsets[row] + min(max(bytes_max, 0), INT64_MAX - columns.offsets[row])
    low, high = row + 1, end
    while low < high:
        middle = (low + high + 1) // 2
        if columns.offsets[middle] <= limit:
            low = middle
        else:
            high = middle - 1
    return low, <int64_t>(columns.offsets[low] - columns.offsets[row])
