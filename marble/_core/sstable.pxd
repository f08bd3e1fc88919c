"""What other Cython modules use of an open sstable: its C++ object, and the errors that come of reading it."""
from libc.stdint cimport int64_t, uint64_t
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CBuffer, CRecordBatch, CSchema


cdef extern from "sstable.hpp" namespace "marble" nogil:
    cdef cppclass CKeyCodec "const marble::KeyCodec":
        const shared_ptr[CSchema]& schema() noexcept

    cdef cppclass CLayout "const marble::Layout":
        shared_ptr[CSchema] schema
        shared_ptr[CSchema] get_schema
        shared_ptr[CKeyCodec] codec

    cdef cppclass CIndexHead "marble::IndexHead":
        uint64_t blocks, rows, tombstones, first_index, last_index, has_ttl
        int64_t ttl_min, ttl_max

    cdef cppclass CFileSeal "marble::FileSeal":
        uint64_t size

    cdef cppclass CCacheStats "marble::BlockCache::Stats":
        uint64_t bytes, blocks, hits, misses

    cdef cppclass CBlockCache "marble::BlockCache":
        uint64_t bytes_max() noexcept
        CCacheStats Count() noexcept

    cdef cppclass CTableFile "const marble::TableFile":
        const string& name() noexcept
        const shared_ptr[CLayout]& layout() noexcept
        const CFileSeal& seal() noexcept
        const CIndexHead& head() noexcept
        const shared_ptr[CBuffer]& buffer() noexcept
        size_t blocks() noexcept
        string_view first_key() noexcept
        string_view last_key() noexcept
        CStatus ReadZones(shared_ptr[CRecordBatch]* out) noexcept
        CStatus Verify(string* name) noexcept


cdef class BlockCache:
    cdef shared_ptr[CBlockCache] cache


cdef class SSTable:
    cdef shared_ptr[CTableFile] file
    cdef shared_ptr[CRecordBatch] zones  # Once somebody has asked for them.


# Raises what the status of a read stands for, CorruptionError where stored bytes are damaged; returns 0 if it is OK.
cdef int raise_read_status(const CStatus& status) except -1
