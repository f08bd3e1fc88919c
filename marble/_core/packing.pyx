# distutils: language = c++
"""Users' messages: a bounded queue of them, many small ones as one run of bytes, and that run as messages again.

Layout of a packed run: the bytes of the messages, one after the other, with nothing between; their lengths are kept beside
it as little-endian uint32, one each.
A run travels as the one column of a record batch (`MESSAGE_SCHEMA`), without validity bits.
Ownership: an `Outbox` holds references to what it was given. `pack` copies. A batch and its bytes share their memory. What `unpack` returns shares the memory of the
run, which lives as long as one of its messages.
Thread safety: an `Outbox` may be used from any thread: each method runs from begin to end under the GIL and calls nothing that
could let go of it. `pack` and `unpack` are pure, and a ReceivedMessage is immutable.

Invariants:
1. `Outbox.nbytes` and `Outbox.count` cover what was put and not yet released, taken or not.
2. An Outbox that holds nothing takes any one message, so that no message is too large for ever.
3. No function reads or writes beyond the buffers it is given, whatever the lengths say.
4. Between `begin_wait` and `end_wait` exactly one put, or `interrupt`, says that the taker must be woken.
"""
cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE, PyBytes_CheckExact
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcpy

from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr

from marble.errors import InvariantError, ProtocolError


cdef extern from "arrow/api.h" namespace "arrow" nogil:
    cdef cppclass CBuffer "arrow::Buffer":
        pass
    cdef cppclass CSchema "arrow::Schema":
        pass
    cdef cppclass CRecordBatch "arrow::RecordBatch":
        pass
    cdef cppclass CResult "arrow::Result" [T]:
        cbool ok()
        T ValueOrDie()


cdef extern from "arrow/python/pyarrow.h" namespace "arrow::py":
    int import_pyarrow() except -1
    CResult[shared_ptr[CBuffer]] unwrap_buffer(object)
    CResult[shared_ptr[CRecordBatch]] unwrap_batch(object)
    object wrap_buffer(const shared_ptr[CBuffer]&)
    object wrap_batch(const shared_ptr[CRecordBatch]&)
    object wrap_schema(const shared_ptr[CSchema]&)


cdef extern from "packing.hpp" namespace "marble" nogil:
    const shared_ptr[CSchema]& BytesSchema()
    shared_ptr[CRecordBatch] BatchOfBytes(shared_ptr[CBuffer] bytes)
    shared_ptr[CBuffer] BytesOfBatch(const CRecordBatch& batch)


import_pyarrow()

MESSAGE_SCHEMA = wrap_schema(BytesSchema())

cdef enum:
    QUEUED_ = 0
    WAKE_ = 1
    FULL_ = 2
    CLOSED_ = 3

QUEUED = QUEUED_
WAKE = WAKE_
FULL = FULL_
CLOSED = CLOSED_


cdef inline Py_ssize_t size_of(data) except -1:
    return PyBytes_GET_SIZE(data) if PyBytes_CheckExact(data) else len(data)


@cython.final
cdef class Outbox:
    cdef list items
    cdef Py_ssize_t head
    cdef readonly int64_t nbytes, count
    cdef int64_t bytes_max, count_max
    cdef readonly bint accepting
    cdef bint waiting, starved, interrupted

    def __cinit__(self, int64_t bytes_max, int64_t count_max):
        self.items = []
        self.head = 0
        self.bytes_max = bytes_max
        self.count_max = count_max
        self.accepting = True

    cdef int _put(self, data) except -1:
        cdef Py_ssize_t size = size_of(data)
        if not self.accepting:
            return CLOSED_
        if self.count and (self.count >= self.count_max or self.nbytes + size > self.bytes_max):
            self.starved = True
            return FULL_
        self.items.append(data)
        self.nbytes += size
        self.count += 1
        if self.waiting:
            self.waiting = False
            return WAKE_
        return QUEUED_

    def put(self, data not None):
        return self._put(data)

    def put_many(self, list messages not None, Py_ssize_t first):
        cdef Py_ssize_t number = first
        cdef bint wake = False
        cdef int said = QUEUED_
        while number < len(messages):
            said = self._put(messages[number])
            if said >= FULL_:
                break
            wake = wake or said == WAKE_
            number += 1
        return number - first, wake, said >= FULL_

    def open(self):
        self.accepting = True

    def close(self):
        self.accepting = False

    def begin_wait(self):
        """Whether there is nothing to take: then the next put says that the taker must be woken."""
        self.waiting = self.head == len(self.items) and not self.interrupted
        self.interrupted = False
        return self.waiting

    def end_wait(self):
        cdef bint quiet = self.waiting
        self.waiting = False
        return quiet

    def interrupt(self):
        cdef bint waits = self.waiting
        self.waiting = False
        # Who is only just about to wait must not.
        self.interrupted = not waits
        return waits

    def take(self, int64_t bytes_max, int64_t count_max):
        cdef Py_ssize_t end = self.head
        cdef int64_t size = 0
        cdef list taken
        while end < len(self.items) and end - self.head < count_max:
            size += size_of(self.items[end])
            if size > bytes_max and end > self.head:
                break
            end += 1
        if self.head == 0 and end == len(self.items):
            taken, self.items = self.items, []
            return taken
        taken = self.items[self.head : end]
        self.head = end
        # What was taken is forgotten now and then, so that each message is moved about once.
        if 2 * self.head >= len(self.items):
            del self.items[: self.head]
            self.head = 0
        return taken

    def release(self, list taken not None):
        cdef int64_t size = 0
        for data in taken:
            size += size_of(data)
        self.nbytes -= size
        self.count -= len(taken)
        return size

    def fed(self):
        cdef bint starved = self.starved
        self.starved = False
        return starved

    def drain(self):
        cdef list left = self.items[self.head :]
        self.items, self.head = [], 0
        return left


def batch_of_bytes(bytes_ not None):
    cdef CResult[shared_ptr[CBuffer]] buffer = unwrap_buffer(bytes_)
    if not buffer.ok():
        raise InvariantError(f"expected a pyarrow.Buffer, got {type(bytes_).__name__}")
    return wrap_batch(BatchOfBytes(buffer.ValueOrDie()))


def bytes_of_batch(batch not None):
    cdef CResult[shared_ptr[CRecordBatch]] value = unwrap_batch(batch)
    cdef shared_ptr[CBuffer] found
    if value.ok():
        found = BytesOfBatch(value.ValueOrDie().get()[0])
    if found.get() == NULL:
        raise ProtocolError("not a batch of messages, or one with missing bytes")
    return wrap_buffer(found)


def pack(list items not None, out not None):
    cdef Py_buffer target, source
    cdef Py_ssize_t at = 0, size, number = 0
    cdef lengths = PyBytes_FromStringAndSize(NULL, 4 * len(items))
    cdef uint32_t* numbers = <uint32_t*>PyBytes_AS_STRING(lengths)
    cdef char* place
    PyObject_GetBuffer(out, &target, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        place = <char*>target.buf
        for data in items:
            size = size_of(data)
            if size > target.len - at or size > 0xFFFFFFFF:
                raise InvariantError(f"{len(items)} messages do not fit {target.len} bytes")
            if PyBytes_CheckExact(data):
                memcpy(place + at, PyBytes_AS_STRING(data), size)
            else:
                PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
                memcpy(place + at, source.buf, min(size, source.len))
                PyBuffer_Release(&source)
            # Little-endian is what every machine that Arrow's wheels are built for is.
            numbers[number] = <uint32_t>size
            number += 1
            at += size
        if at != target.len:
            raise InvariantError(f"{len(items)} messages do not fill {target.len} bytes")
    finally:
        PyBuffer_Release(&target)
    return lengths


# Neither of the two can be part of a cycle: tracking every message would let the collector run all the time.
@cython.final
@cython.no_gc
cdef class _Run:
    """Keeps the memory of a run."""

    cdef Py_buffer view
    cdef bint held

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


@cython.final
@cython.no_gc
@cython.freelist(4096)
cdef class ReceivedMessage:
    cdef readonly uint32_t sender
    cdef _Run run
    cdef const uint8_t* start
    cdef Py_ssize_t size

    def __init__(self):
        raise TypeError("messages are received, not made")

    def __len__(self):
        return self.size

    def __bytes__(self):
        return PyBytes_FromStringAndSize(<const char*>self.start, self.size)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void*>self.start, self.size, 1, flags)

    @property
    def data(self):
        return memoryview(self)

    def __repr__(self):
        return f"<message of {self.size} bytes from node {self.sender}>"


def unpack(run not None, lengths not None, uint32_t sender, Py_ssize_t skip=0):
    cdef Py_buffer numbers
    cdef _Run keeper = _Run.__new__(_Run)
    cdef ReceivedMessage message
    cdef list messages = []
    cdef Py_ssize_t at = 0, number, count
    cdef uint32_t size = 0
    PyObject_GetBuffer(run, &keeper.view, PyBUF_SIMPLE)
    keeper.held = True
    PyObject_GetBuffer(lengths, &numbers, PyBUF_SIMPLE)
    try:
        if numbers.len % 4:
            raise ProtocolError(f"lengths of messages in {numbers.len} bytes")
        count = numbers.len // 4
        for number in range(count):
            memcpy(&size, <const char*>numbers.buf + 4 * number, 4)
            if size > keeper.view.len - at:
                raise ProtocolError(f"messages beyond the {keeper.view.len} bytes of their packet")
            if number >= skip:
                message = ReceivedMessage.__new__(ReceivedMessage)
                message.sender = sender
                message.run = keeper
                message.start = <const uint8_t*>keeper.view.buf + at
                message.size = size
                messages.append(message)
            at += size
        if at != keeper.view.len:
            raise ProtocolError(f"messages of {at} bytes in a packet of {keeper.view.len}")
    finally:
        PyBuffer_Release(&numbers)
    return messages
