# distutils: language = c++
"""Primary keys as bytes that sort as the keys do: the face of ``key_codec.hpp``, where the layout is written down.

Ownership: an encoded column owns a copy of its bytes; the batch may go.
Thread safety: codec and columns are immutable, any thread may use them; rows are walked with the GIL released.
Invariants: a `KeyColumn` and a `KeyCodec` always hold a C++ object, since neither can be made or left without one.
"""
cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector
from marble._core.arrow_face cimport batch_of, import_pyarrow, raise_status, schema_of, wrap_batch, wrap_schema
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CRecordBatch, CSchema

import pyarrow as pa

from marble.errors import UsageError

import_pyarrow()

# Known inside of this module only: without it no object is made whose C++ part is missing.
cdef object _MAKER = object()


cdef extern from "key_codec.hpp" namespace "marble" nogil:
    cdef cppclass CKeyColumn "const marble::KeyColumn":
        int64_t rows
        int64_t width
        const uint8_t* data(int64_t row) noexcept
        uint64_t size(int64_t row) noexcept
        uint64_t nbytes() noexcept

    cdef cppclass CKeyCodec "const marble::KeyCodec":
        const shared_ptr[CSchema]& schema() noexcept
        int64_t width() noexcept
        CStatus Encode(const CRecordBatch& batch, shared_ptr[CKeyColumn]* out) noexcept

    CStatus make_codec "marble::KeyCodec::Make"(shared_ptr[CSchema] schema, shared_ptr[CKeyCodec]* out) noexcept


cdef extern from "key_value.hpp" namespace "marble":
    cbool encode_key_start "marble::EncodeKeyStart"(const CKeyCodec& codec, object values, string* key) except +
    PyObject* c_type_of_all "marble::TypeOfAll"(object values) noexcept


cdef extern from "key_decode.hpp" namespace "marble" nogil:
    CStatus decode_keys "marble::KeyDecoder::DecodeBatch"(
        const CKeyCodec& codec, const vector[string]& keys, shared_ptr[CRecordBatch]* out) noexcept


@cython.final
cdef class KeyColumn:
    cdef shared_ptr[CKeyColumn] column

    def __cinit__(self, maker=None):
        if maker is not _MAKER:
            raise TypeError("a KeyColumn comes from KeyCodec.encode")

    @property
    def width(self):
        return self.column.get().width or None

    @property
    def nbytes(self):
        return self.column.get().nbytes()

    def __len__(self):
        return self.column.get().rows

    def to_pylist(self):
        cdef CKeyColumn* column = self.column.get()
        cdef int64_t row
        keys = []
        for row in range(column.rows):
            keys.append(PyBytes_FromStringAndSize(<const char*>column.data(row), <Py_ssize_t>column.size(row)))
        return keys


@cython.final
cdef class KeyCodec:
    cdef shared_ptr[CKeyCodec] codec

    # The C++ object is made in __cinit__, so that not even a subclass that forgets __init__ can be without one.
    def __cinit__(self, schema):
        cdef shared_ptr[CSchema] c_schema
        schema_of(schema, &c_schema)
        raise_status(make_codec(c_schema, &self.codec))

    @property
    def schema(self):
        return wrap_schema(self.codec.get().schema())

    @property
    def width(self):
        return self.codec.get().width() or None

    def encode(self, batch):
        cdef shared_ptr[CRecordBatch] c_batch
        cdef CStatus status
        batch_of(batch, &c_batch)
        cdef KeyColumn column = KeyColumn.__new__(KeyColumn, _MAKER)
        with nogil:
            status = self.codec.get().Encode(c_batch.get()[0], &column.column)
        raise_status(status)
        return column

    def encode_prefix(self, batch, *, open_end=False):
        schema = self.schema
        count = batch.num_columns if isinstance(batch, pa.RecordBatch) else 0
        if not 1 <= count <= len(schema):
            raise UsageError(f"a beginning of the key is a batch of 1 to {len(schema)} of its columns, from the first on")
        keys = KeyCodec(pa.schema([schema.field(i) for i in range(count)])).encode(batch).to_pylist()
        if not open_end:
            return keys
        last = schema.field(count - 1)
        if last.type not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
            raise UsageError(f"only text and bytes can go on: key column {last.name!r} has type {last.type}")
        return [key[:-2] for key in keys]

    def encode_values(self, tuple values not None):
        cdef string key
        if not encode_key_start(self.codec.get()[0], values, &key):
            return None
        return key

    def decode(self, keys):
        cdef vector[string] c_keys
        cdef shared_ptr[CRecordBatch] batch
        cdef CStatus status
        for key in keys:
            if not isinstance(key, bytes):
                raise UsageError(f"an encoded key is bytes, got {key!r}")
            c_keys.push_back(key)
        with nogil:
            status = decode_keys(self.codec.get()[0], c_keys, &batch)
        raise_status(status)
        return wrap_batch(batch)


def type_of_all(values):
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"expected a list or a tuple, got {type(values).__name__}")
    cdef PyObject* found = c_type_of_all(values)
    return None if found == NULL else <object>found


def prefix_end(bytes prefix):
    start = prefix.rstrip(b"\xff")
    return start[:-1] + bytes([start[-1] + 1]) if start else None
