# distutils: language = c++
"""Log entries as rows of a record batch, and table rows as payloads of entries.

Layout: see `marble.schema.ENTRY_SCHEMA` and the head of ``entry_batch.hpp``, which holds the loops. A payload is one
encapsulated Arrow IPC record-batch message (V5, uncompressed, 64-byte alignment), filled with zeros to a whole number
of 64 bytes. An entry's checksum is XXH3-64 over ``struct "<BxxxIQQ"`` of (kind, table, session, sequence) and the payload.

Ownership: batches and buffers that are returned share or own their memory; a Proposal keeps its payload alive.
Thread safety: everything here is immutable once made; all functions may run at once on the same arguments. The GIL is
released wherever many rows or payload bytes are walked (``gil.hpp``).

Invariants:
1. A Proposal's checksum is computed once, from the buffer that it keeps, when it is made.
2. The bytes of an entry, for every limit on bytes, are the bytes of its payload: ``Proposal.nbytes``, ``span(batch).sizes()``.
3. Functions that read offsets of a batch trust them: a batch from outside has passed ``validate(full=True)`` before.
"""
cimport cython
from cpython.pystate cimport PyThreadState
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.utility cimport move
from libcpp.vector cimport vector

from marble._core.gil cimport release_gil, take_gil

from marble._core.term_index import EntrySpan
from marble.errors import CorruptionError, InvariantError, ProtocolError, UsageError
from marble.schema import ENTRY_SCHEMA as _ENTRY_SCHEMA
from marble.types import INDEX_MAX as _INDEX_MAX, EntryKind


cdef extern from "arrow/api.h" namespace "arrow" nogil:
    cdef cppclass CStatus "arrow::Status":
        cbool ok()
        cbool IsOutOfMemory()
        string ToString()
        string message()
    cdef cppclass CResult "arrow::Result" [T]:
        cbool ok()
        const CStatus& status()
        T ValueOrDie()
    cdef cppclass CBuffer "arrow::Buffer":
        int64_t size()
        cbool is_cpu()
        const uint8_t* data()
    cdef cppclass CSchema "arrow::Schema":
        pass
    cdef cppclass CRecordBatch "arrow::RecordBatch":
        int64_t num_rows()
    cdef CResult[shared_ptr[CRecordBatch]] ConcatenateRecordBatches(const vector[shared_ptr[CRecordBatch]]& batches)


cdef extern from "arrow/python/pyarrow.h" namespace "arrow::py":
    int import_pyarrow() except -1
    CResult[shared_ptr[CBuffer]] unwrap_buffer(object)
    CResult[shared_ptr[CSchema]] unwrap_schema(object)
    CResult[shared_ptr[CRecordBatch]] unwrap_batch(object)
    object wrap_buffer(const shared_ptr[CBuffer]&)
    object wrap_batch(const shared_ptr[CRecordBatch]&)


cdef extern from "aligned.hpp" namespace "marble":
    CResult[shared_ptr[CRecordBatch]] aligned_batch "marble::AlignedBatch"(shared_ptr[CRecordBatch] batch)


cdef extern from "entry_batch.hpp" namespace "marble" nogil:
    cdef cppclass ProposalData:
        uint8_t kind
        uint32_t table
        uint64_t session
        uint64_t sequence
        uint64_t checksum
        shared_ptr[CBuffer] payload
        int64_t size()
    cdef cppclass Entries:
        int64_t rows
        const uint32_t* group
        const uint64_t* index
        const uint64_t* term
        const uint8_t* kind
        const uint64_t* session
        const uint64_t* sequence
        const uint64_t* time_us
        const uint32_t* table
        const int32_t* offsets
    cbool IsEntry(uint8_t kind)
    cbool HasPayload(uint8_t kind)
    uint64_t EntryChecksum(uint8_t kind, uint32_t table, uint64_t session, uint64_t sequence, const uint8_t* payload, int64_t size)
    void Seal(ProposalData* proposal)
    CStatus OpenEntries(const CRecordBatch& batch, const CSchema& expected, Entries* out)
    int64_t FirstDamaged(const Entries& entries)
    CStatus CheckContiguous(const Entries& entries)
    CResult[shared_ptr[CRecordBatch]] BuildEntries(const shared_ptr[CSchema]& schema, uint32_t group, uint64_t first_index,
                                                   uint64_t term, uint64_t time_us,
                                                   const vector[const ProposalData*]& proposals)
    CResult[shared_ptr[CBuffer]] EncodePayload(const CRecordBatch& batch)
    CResult[shared_ptr[CRecordBatch]] DecodePayload(shared_ptr[CBuffer] buffer, const shared_ptr[CSchema]& schema)
    CStatus SpanColumns(const CRecordBatch& batch, const Entries& entries, shared_ptr[CBuffer]* terms, shared_ptr[CBuffer]* sizes)
    shared_ptr[CBuffer] PayloadSlice(const CRecordBatch& batch, const Entries& entries, int64_t row)
    CResult[shared_ptr[CRecordBatch]] Admit(const CRecordBatch& batch, const shared_ptr[CSchema]& schema, int64_t bytes_max,
                                           cbool snapshot)
    void FindChanges(const Entries& entries, vector[uint64_t]* out) except +
    uint64_t PlacesChecksum(const Entries& entries, uint64_t seed)


cdef extern from "arrow/util/byte_size.h" namespace "arrow::util" nogil:
    int64_t TotalBufferSize(const CRecordBatch& batch)


import_pyarrow()
ENTRY_SCHEMA = _ENTRY_SCHEMA
cdef shared_ptr[CSchema] entry_schema = unwrap_schema(ENTRY_SCHEMA).ValueOrDie()
cdef uint8_t CLOSE_SESSION = EntryKind.CLOSE_SESSION
cdef uint8_t SNAPSHOT = EntryKind.SNAPSHOT


cdef int raise_unless_ok(const CStatus& status, error) except -1:
    """Turn a status that is not OK into `error`; running out of memory stays what it is."""
    if status.ok():
        return 0
    if status.IsOutOfMemory():
        raise MemoryError(status.ToString().decode("utf-8", "replace"))
    raise error(status.message().decode("utf-8", "replace"))


cdef shared_ptr[CRecordBatch] batch_of(object batch) except *:
    cdef CResult[shared_ptr[CRecordBatch]] result = unwrap_batch(batch)
    if not result.ok():
        raise UsageError(f"expected a pyarrow.RecordBatch, got {type(batch).__name__}")
    cdef CResult[shared_ptr[CRecordBatch]] aligned = aligned_batch(result.ValueOrDie())
    raise_unless_ok(aligned.status(), InvariantError)
    return aligned.ValueOrDie()


cdef shared_ptr[CBuffer] buffer_of(object buffer) except *:
    cdef CResult[shared_ptr[CBuffer]] result = unwrap_buffer(buffer)
    if not result.ok():
        raise UsageError(f"expected a pyarrow.Buffer, got {type(buffer).__name__}")
    cdef shared_ptr[CBuffer] value = result.ValueOrDie()
    if not value.get().is_cpu():
        raise UsageError("expected a pyarrow.Buffer in main memory")
    return value


@cython.final
cdef class Proposal:
    """An entry as its proposer makes it: all but its place in the log. Immutable.

    Invariants: ``checksum`` covers kind, table, session, sequence and payload; a payload is never empty (None stands for
    that) and is a whole number of 64 bytes.
    """

    cdef ProposalData value
    cdef readonly object payload

    def __cinit__(self, kind, uint32_t table=0, payload=None, uint64_t session=0, uint64_t sequence=0):
        cdef int number = int(kind)
        if not 0 <= number <= 255 or not IsEntry(<uint8_t>number):
            raise UsageError(f"{kind!r} is not the kind of an entry that can be proposed")
        self.value.kind = <uint8_t>number
        self.value.table = table
        self.value.session = session
        self.value.sequence = sequence
        self.payload = None
        if payload is not None:
            self.value.payload = buffer_of(payload)
            if self.value.size() % 64 != 0 or self.value.size() == 0:
                raise UsageError(f"a payload of {self.value.size()} bytes: make payloads with encode_payload")
            self.payload = payload
        if (self.payload is not None) != HasPayload(<uint8_t>number):
            raise UsageError(f"an entry of kind {EntryKind(number).name} {'without' if payload is None else 'with'} payload")
        if number == CLOSE_SESSION and session == 0:
            raise UsageError("an entry that closes a session must name it")
        cdef PyThreadState* released = release_gil(self.value.size())
        Seal(&self.value)
        take_gil(released)

    @property
    def kind(self):
        return EntryKind(self.value.kind)

    @property
    def table(self):
        return self.value.table

    @property
    def session(self):
        return self.value.session

    @property
    def sequence(self):
        return self.value.sequence

    @property
    def checksum(self):
        return self.value.checksum

    @property
    def nbytes(self):
        return self.value.size()

    def __repr__(self):
        return (f"Proposal({self.kind.name}, table={self.table}, {self.nbytes} bytes, "
                f"session={self.session}, sequence={self.sequence})")


def entry_checksum(kind, uint64_t session, uint64_t sequence, uint32_t table, payload=None):
    """The checksum of an entry with this content."""
    cdef shared_ptr[CBuffer] data
    cdef const uint8_t* start = NULL
    cdef int64_t size = 0
    cdef uint64_t digest
    cdef uint8_t number = int(kind)
    if payload is not None:
        data = buffer_of(payload)
        start = data.get().data()
        size = data.get().size()
    cdef PyThreadState* released = release_gil(size)
    digest = EntryChecksum(number, table, session, sequence, start, size)
    take_gil(released)
    return digest


def encode_payload(batch):
    """One IPC message with the rows of `batch`, zero-filled to a whole number of 64 bytes."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef CResult[shared_ptr[CBuffer]] result
    cdef PyThreadState* released = release_gil(TotalBufferSize(value.get()[0]))
    result = move(EncodePayload(value.get()[0]))
    take_gil(released)
    raise_unless_ok(result.status(), UsageError)
    return wrap_buffer(result.ValueOrDie())


def decode_payload(buffer, schema):
    """The rows of a payload made by `encode_payload` of a batch of `schema`."""
    cdef shared_ptr[CBuffer] data = buffer_of(buffer)
    cdef CResult[shared_ptr[CSchema]] unwrapped = unwrap_schema(schema)
    if not unwrapped.ok():
        raise UsageError(f"expected a pyarrow.Schema, got {type(schema).__name__}")
    cdef shared_ptr[CSchema] expected = unwrapped.ValueOrDie()
    cdef CResult[shared_ptr[CRecordBatch]] result
    cdef PyThreadState* released = release_gil(data.get().size())
    result = move(DecodePayload(data, expected))
    take_gil(released)
    raise_unless_ok(result.status(), ProtocolError)
    return wrap_batch(result.ValueOrDie())


def build(uint32_t group, uint64_t first_index, uint64_t term, proposals, uint64_t time_us=0):
    """The rows of `proposals` as entries first_index, first_index + 1, ... of `term`, taken in at `time_us`."""
    cdef vector[const ProposalData*] values
    cdef CResult[shared_ptr[CRecordBatch]] result
    cdef Proposal proposal
    # Holds every Proposal for the time that the GIL is released, whatever happens to the caller's list meanwhile.
    cdef tuple held = tuple(proposals)
    cdef int64_t nbytes = 0
    for item in held:
        proposal = <Proposal?>item
        values.push_back(&proposal.value)
        nbytes += proposal.value.size()
    if not 1 <= first_index <= _INDEX_MAX - len(held) or not 1 <= term <= _INDEX_MAX:
        raise InvariantError(f"{len(held)} entries at index {first_index}, term {term}")
    if time_us > _INDEX_MAX:
        raise InvariantError(f"entries taken in at {time_us} us")
    cdef PyThreadState* released = release_gil(nbytes)
    result = move(BuildEntries(entry_schema, group, first_index, term, time_us, values))
    take_gil(released)
    raise_unless_ok(result.status(), UsageError)
    return wrap_batch(result.ValueOrDie())


def snapshot_row(uint32_t group, uint64_t index, uint64_t term, uint64_t session, uint64_t sequence, payload=None):
    """One row of kind SNAPSHOT."""
    cdef ProposalData value
    cdef vector[const ProposalData*] values
    cdef CResult[shared_ptr[CRecordBatch]] result
    if not 1 <= index <= _INDEX_MAX or not 1 <= term <= _INDEX_MAX:
        raise InvariantError(f"a snapshot at index {index}, term {term}")
    value.kind, value.table, value.session, value.sequence = SNAPSHOT, 0, session, sequence
    if payload is not None:
        value.payload = buffer_of(payload)
        if value.size() % 64 != 0 or value.size() == 0:
            raise InvariantError(f"a snapshot with a payload of {value.size()} bytes")
    values.push_back(&value)
    with nogil:
        Seal(&value)
        result = move(BuildEntries(entry_schema, group, index, term, 0, values))
    raise_unless_ok(result.status(), UsageError)
    return wrap_batch(result.ValueOrDie())


# Of so few rows the numbers are looked through with the GIL held.
cdef int64_t SHORT_ROWS = 1024


cdef int64_t nbytes_of(const Entries& entries) noexcept nogil:
    """What the payloads have."""
    return 0 if entries.rows == 0 else entries.offsets[entries.rows] - entries.offsets[0]


def verify(batch):
    """Recompute the checksum of every entry of `batch`."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef Entries entries
    cdef int64_t row = -1
    raise_unless_ok(OpenEntries(value.get()[0], entry_schema.get()[0], &entries), CorruptionError)
    cdef PyThreadState* released = release_gil(nbytes_of(entries))
    row = FirstDamaged(entries)
    take_gil(released)
    if row >= 0:
        raise CorruptionError(
            f"entry {entries.index[row]} of term {entries.term[row]}, group {entries.group[row]} "
            "does not match its checksum: it was damaged after it was proposed"
        )


def check_contiguous(batch):
    """Check that the rows of `batch` are a run of one group's log."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef Entries entries
    raise_unless_ok(OpenEntries(value.get()[0], entry_schema.get()[0], &entries), ProtocolError)
    raise_unless_ok(CheckContiguous(entries), ProtocolError)


def changes(batch):
    """Indexes of the rows of `batch` that change the membership."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef Entries entries
    cdef vector[uint64_t] found
    raise_unless_ok(OpenEntries(value.get()[0], entry_schema.get()[0], &entries), UsageError)
    if entries.rows < SHORT_ROWS:
        FindChanges(entries, &found)
    else:
        with nogil:
            FindChanges(entries, &found)
    return tuple(found)


def heads(batch):
    """What each row of `batch` says beside its payload, as tuples."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef Entries entries
    cdef int64_t row = 0
    raise_unless_ok(OpenEntries(value.get()[0], entry_schema.get()[0], &entries), UsageError)
    found = []
    while row < entries.rows:
        found.append((
            entries.index[row], entries.kind[row], entries.session[row], entries.sequence[row], entries.time_us[row],
            entries.table[row],
        ))
        row += 1
    return found


def admit(batch, int64_t bytes_max, cbool snapshot=False):
    """Check everything about a batch that a peer has sent, and return an aligned copy that no one else holds."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef CResult[shared_ptr[CRecordBatch]] result
    cdef PyThreadState* released = release_gil(TotalBufferSize(value.get()[0]))
    result = move(Admit(value.get()[0], entry_schema, bytes_max, snapshot))
    take_gil(released)
    raise_unless_ok(result.status(), ProtocolError)
    return wrap_batch(result.ValueOrDie())


def group_of(batch):
    """The group of the first entry."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef Entries entries
    raise_unless_ok(OpenEntries(value.get()[0], entry_schema.get()[0], &entries), UsageError)
    if entries.rows == 0:
        raise UsageError("a batch without entries is of no group")
    return entries.group[0]


def payload(batch, int64_t row):
    """The payload of row `row`, sharing the memory of `batch`."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef Entries entries
    raise_unless_ok(OpenEntries(value.get()[0], entry_schema.get()[0], &entries), UsageError)
    if not 0 <= row < entries.rows:
        raise IndexError(f"row {row} of a batch of {entries.rows} entries")
    return wrap_buffer(PayloadSlice(value.get()[0], entries, row))


def span(batch):
    """Indexes, terms and payload sizes of the entries of `batch`."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef Entries entries
    cdef shared_ptr[CBuffer] terms
    cdef shared_ptr[CBuffer] sizes
    raise_unless_ok(OpenEntries(value.get()[0], entry_schema.get()[0], &entries), UsageError)
    if entries.rows == 0:
        raise UsageError("a batch without entries has no place in the log")
    raise_unless_ok(SpanColumns(value.get()[0], entries, &terms, &sizes), InvariantError)
    return EntrySpan.from_buffers(entries.index[0], wrap_buffer(terms), wrap_buffer(sizes))


def places_checksum(batch, uint64_t seed=0):
    """XXH3-64 with `seed` over the columns index, term, time_us and checksum, one after the other."""
    cdef shared_ptr[CRecordBatch] value = batch_of(batch)
    cdef Entries entries
    cdef uint64_t digest
    raise_unless_ok(OpenEntries(value.get()[0], entry_schema.get()[0], &entries), UsageError)
    with nogil:
        digest = PlacesChecksum(entries, seed)
    return digest


def concat(batches):
    """The rows of all `batches` in one batch with contiguous buffers."""
    cdef vector[shared_ptr[CRecordBatch]] values
    cdef CResult[shared_ptr[CRecordBatch]] result
    cdef Entries entries
    cdef tuple held = tuple(batches)
    for batch in held:
        values.push_back(batch_of(batch))
        raise_unless_ok(OpenEntries(values.back().get()[0], entry_schema.get()[0], &entries), UsageError)
    if len(held) == 0:
        raise UsageError("nothing to concatenate")
    if len(held) == 1:
        return held[0]
    with nogil:
        result = move(ConcatenateRecordBatches(values))
    raise_unless_ok(result.status(), UsageError)
    return wrap_batch(result.ValueOrDie())
