"""What other Cython modules use of an open sstable: its C++ object, and the errors that come of reading it."""
from libcpp.memory cimport shared_ptr
from pyarrow.includes.common cimport CStatus


cdef extern from "sstable.hpp" namespace "marble" nogil:
    cdef cppclass CTableFile "const marble::TableFile":
        pass


cdef class BlockCache:
    pass


cdef class SSTable:
    cdef shared_ptr[CTableFile] file


# Raises what `status` of a read stands for, CorruptionError where stored bytes are damaged; returns 0 if it is OK.
cdef int raise_read_status(const CStatus& status) except -1
