"""What other Cython modules use of a memtable's snapshot: its C++ object."""
from libc.stdint cimport int64_t, uint64_t
from libcpp.memory cimport shared_ptr
from libcpp.vector cimport vector
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CArray, CRecordBatch, CSchema


cdef extern from "memtable_state.hpp" namespace "marble" nogil:
    cdef cppclass CKeyCodec "const marble::KeyCodec":
        const shared_ptr[CSchema]& schema() noexcept

    cdef cppclass CLayout "const marble::Layout":
        shared_ptr[CSchema] schema
        shared_ptr[CSchema] get_schema
        vector[int] key
        shared_ptr[CKeyCodec] codec
        int PositionInKey(int column) noexcept

    cdef cppclass CState "const marble::State":
        shared_ptr[CLayout] layout
        vector[int] runs  # Of another element type in truth: only its size is asked for.
        uint64_t index
        uint64_t CountEntries() noexcept
        uint64_t AboutBytes() noexcept
        CStatus CountRows(int64_t* out) noexcept
        CStatus CountBytes(uint64_t* out) noexcept
        CStatus GetMany(const CRecordBatch& keys, shared_ptr[CRecordBatch]* out, shared_ptr[CArray]* found) noexcept


cdef class Snapshot:
    cdef shared_ptr[CState] state
