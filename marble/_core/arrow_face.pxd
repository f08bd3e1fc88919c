"""Between pyarrow's objects and Arrow C++: what the Cython modules beside this file share.

Through Arrow's own C++ face of pyarrow, not ``cimport pyarrow.lib``, which drags unused tables into each module. A
module that uses these must call `import_pyarrow` once when it is imported.

Errors: the kernels use Invalid for a wrong call, OutOfMemory as is; anything else means that marble is wrong.
"""
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CArray, CDataType, CRecordBatch, CSchema


cdef extern from "arrow/result.h" namespace "arrow" nogil:
    cdef cppclass CResult "arrow::Result"[T]:
        cbool ok()
        CStatus status()
        T ValueOrDie()


cdef extern from "arrow/python/pyarrow.h" namespace "arrow::py":
    int import_pyarrow() except -1
    cbool is_batch(object batch)
    cbool is_schema(object schema)
    CResult[shared_ptr[CRecordBatch]] unwrap_batch(object batch)
    CResult[shared_ptr[CSchema]] unwrap_schema(object schema)
    object wrap_array(const shared_ptr[CArray]& array)
    object wrap_batch(const shared_ptr[CRecordBatch]& batch)
    object wrap_schema(const shared_ptr[CSchema]& schema)
    object wrap_type "arrow::py::wrap_data_type"(const shared_ptr[CDataType]& type)


cdef extern from "aligned.hpp" namespace "marble":
    CResult[shared_ptr[CRecordBatch]] aligned_batch "marble::AlignedBatch"(shared_ptr[CRecordBatch] batch)


cdef inline int raise_status(const CStatus& status) except -1:
    """Raise what `status` stands for; return 0 if it is OK. Needs the GIL, allocates only when raising."""
    if status.ok():
        return 0
    from marble.errors import InvariantError, UsageError

    message = status.message().decode("utf-8", "replace")
    if status.IsInvalid() or status.IsTypeError():
        raise UsageError(message)
    if status.IsOutOfMemory():
        raise MemoryError(message)
    raise InvariantError(message)


cdef inline int batch_of(object batch, shared_ptr[CRecordBatch]* out) except -1:
    """Take the C++ batch out of a pyarrow.RecordBatch, its buffers aligned."""
    if not is_batch(batch):
        from marble.errors import UsageError

        raise UsageError(f"expected a pyarrow.RecordBatch, got {type(batch).__name__}")
    cdef CResult[shared_ptr[CRecordBatch]] aligned = aligned_batch(unwrap_batch(batch).ValueOrDie())
    raise_status(aligned.status())
    out[0] = aligned.ValueOrDie()
    return 0


cdef inline int schema_of(object schema, shared_ptr[CSchema]* out) except -1:
    """Take the C++ schema out of a pyarrow.Schema."""
    if not is_schema(schema):
        from marble.errors import UsageError

        raise UsageError(f"expected a pyarrow.Schema, got {type(schema).__name__}")
    out[0] = unwrap_schema(schema).ValueOrDie()
    return 0
