# distutils: language = c++
"""Stopping a Flight server at a deadline, although streams are open.

``pyarrow.flight.FlightServerBase.shutdown()`` waits until every call has ended by itself, so that one silent client keeps a
node from stopping. The C++ server behind it can cancel calls at a deadline; pyarrow does not pass that on. This module
reaches the C++ server through the object that pyarrow made.

Layout: `MarbleFlightServerObject` repeats the layout of pyarrow's class; importing this module fails if its size is not
that of the real class, and CMake links it to one major version of Arrow.
Ownership: borrowed from the Python server object, which must stay alive during the call.
Thread safety: may be called from any thread but a handler's own; the GIL is released while waiting.

Invariants:
1. Nothing here is called on a server whose finalizer has run: its C++ server is gone then (checked: a null pointer).
"""
from cpython.ref cimport Py_INCREF
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string


cdef extern from "arrow/api.h" namespace "arrow" nogil:
    cdef cppclass CStatus "arrow::Status":
        cbool ok()
        string ToString()


cdef extern from "shutdown.hpp" namespace "arrow::py::flight" nogil:
    cdef cppclass PyFlightServer:
        pass


cdef extern from "shutdown.hpp" namespace "marble":
    ctypedef class pyarrow._flight.FlightServerBase [object MarbleFlightServerObject, check_size error]:
        cdef shared_ptr[PyFlightServer] server
        cdef object finalizer

    CStatus ShutDownWithin(PyFlightServer* server, double seconds) nogil


def shut_down(FlightServerBase server not None, double grace_s):
    """Refuse new calls, wait up to `grace_s` seconds for open ones, then cancel them; return when all handlers have ended."""
    # A copy keeps the C++ server alive if a finalizer runs meanwhile.
    cdef shared_ptr[PyFlightServer] target = server.server
    cdef CStatus status
    if target.get() == NULL:
        return
    with nogil:
        status = ShutDownWithin(target.get(), grace_s)
    if not status.ok():
        raise RuntimeError(status.ToString().decode("utf-8", "replace"))


def finalizer_of(FlightServerBase server not None):
    """The ``weakref.finalize`` that pyarrow runs at interpreter exit; it waits for open calls without a deadline."""
    return server.finalizer


def immortalize(value not None):
    """Keep `value`, and all that it holds, from ever being destroyed."""
    Py_INCREF(value)
