# distutils: language = c++
"""What a filter is and says, asked of Arrow's own expression in place: without writing it down or applying it to anything.

Ownership: an expression is borrowed for the length of a call; what is returned are copies.
Thread safety: expressions are immutable; any thread may ask. The GIL is kept, since an answer takes a microsecond.
Invariants: `key_bounds` gives bounds only where a row passes if and only if its key lies in them (``key_filter.hpp``).
"""
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from marble._core.arrow_face cimport import_pyarrow, raise_status, schema_of, wrap_type
from pyarrow._compute cimport Expression
from pyarrow.includes.common cimport CStatus
from pyarrow.includes.libarrow cimport CDataType, CExpression, CSchema

from marble.errors import UsageError

import_pyarrow()


# `cimport pyarrow._compute` brings tables of functions along, most of which nobody uses here.
cdef extern from *:
    """
    #pragma GCC diagnostic ignored "-Wunused-variable"
    """


cdef extern from "key_codec.hpp" namespace "marble" nogil:
    cdef cppclass CKeyCodec "const marble::KeyCodec":
        pass

    CStatus make_codec "marble::KeyCodec::Make"(shared_ptr[CSchema] schema, shared_ptr[CKeyCodec]* out) noexcept


cdef extern from "key_filter.hpp" namespace "marble" nogil:
    cdef cppclass CKeyBounds "marble::KeyBounds":
        string lower
        cbool has_upper
        string upper

    cbool find_bounds "marble::KeyFilter::Find"(
        const CExpression& filter, const CKeyCodec& codec, CKeyBounds* out) except +

    CStatus type_of_rows "marble::TypeOfRows"(
        const CExpression& expression, const CSchema& schema, shared_ptr[CDataType]* out) noexcept


def key_bounds(Expression filter not None, key_schema):
    cdef shared_ptr[CSchema] schema
    cdef shared_ptr[CKeyCodec] codec
    cdef CKeyBounds bounds
    schema_of(key_schema, &schema)
    raise_status(make_codec(schema, &codec))
    if not find_bounds(filter.unwrap(), codec.get()[0], &bounds):
        return None
    return bounds.lower, bounds.upper if bounds.has_upper else None


def expression_type(Expression expression not None, schema):
    cdef shared_ptr[CSchema] c_schema
    cdef shared_ptr[CDataType] type_
    cdef CStatus status
    schema_of(schema, &c_schema)
    status = type_of_rows(expression.unwrap(), c_schema.get()[0], &type_)
    if not status.ok() and not status.IsOutOfMemory():
        raise UsageError(status.message().decode("utf-8", "replace"))
    raise_status(status)
    return wrap_type(type_)
