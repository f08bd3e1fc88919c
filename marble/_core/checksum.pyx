# distutils: language = c++
"""XXH3-64 over bytes, the one checksum of marble.

Layout: none of its own. Ownership: reads the caller's buffer only for the length of the call.
Thread safety: pure functions.
"""
from libc.stdint cimport uint64_t
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer


cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #include "arrow/vendored/xxhash/xxhash.h"
    static inline uint64_t marble_xxh3(const void* data, size_t size, uint64_t seed) noexcept {
        return XXH3_64bits_withSeed(data, size, seed);
    }
    """
    uint64_t marble_xxh3(const void* data, size_t size, uint64_t seed) noexcept nogil


def xxh3_64(data, uint64_t seed=0):
    """Hash the bytes of any object that offers the buffer protocol."""
    cdef Py_buffer view
    cdef uint64_t digest
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            digest = marble_xxh3(view.buf, <size_t>view.len, seed)
    finally:
        PyBuffer_Release(&view)
    return digest
