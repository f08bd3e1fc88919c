"""Giving the interpreter's lock back around work that takes longer than a change of threads: head of ``gil.hpp``.

    released = release_gil(nbytes)
    work()  # in C++, without exceptions
    take_gil(released)
"""
from cpython.pystate cimport PyThreadState
from libc.stdint cimport int64_t


cdef extern from "gil.hpp" namespace "marble" nogil:
    PyThreadState* release_gil "marble::ReleaseGil" (int64_t nbytes) noexcept
    void take_gil "marble::TakeGil" (PyThreadState* released) noexcept
