# distutils: language = c++
"""XXH3 over bytes: 64 bits to find damage, 128 bits to name what is stored by its content.

Layout: none of its own. Ownership: reads the caller's buffer only for the length of the call; an Xxh3 or Xxh3Name owns its state.
Thread safety: `xxh3_64` is pure; an Xxh3 or Xxh3Name belongs to one thread at a time.
Invariants: they have their state from ``__cinit__`` on, and for good.
"""
cimport cython
from libc.stdint cimport uint64_t
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer


cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #include <cstring>
    #include "arrow/vendored/xxhash/xxhash.h"
    static inline uint64_t marble_xxh3(const void* data, size_t size, uint64_t seed) noexcept {
        return XXH3_64bits_withSeed(data, size, seed);
    }
    // The canonical form of the hash is big-endian: its hexadecimal digits read as the number does.
    static inline void marble_xxh3_name(const XXH3_state_t* state, unsigned char* out) noexcept {
        XXH128_canonical_t form;
        XXH128_canonicalFromHash(&form, XXH3_128bits_digest(state));
        memcpy(out, form.digest, sizeof form.digest);
    }
    """
    uint64_t marble_xxh3(const void* data, size_t size, uint64_t seed) noexcept nogil

    ctypedef struct XXH3_state_t:
        pass
    ctypedef enum XXH_errorcode:
        pass
    XXH3_state_t* XXH3_createState() noexcept nogil
    XXH_errorcode XXH3_freeState(XXH3_state_t* state) noexcept nogil
    XXH_errorcode XXH3_64bits_reset(XXH3_state_t* state) noexcept nogil
    XXH_errorcode XXH3_64bits_update(XXH3_state_t* state, const void* data, size_t size) noexcept nogil
    uint64_t XXH3_64bits_digest(const XXH3_state_t* state) noexcept nogil
    XXH_errorcode XXH3_128bits_reset(XXH3_state_t* state) noexcept nogil
    XXH_errorcode XXH3_128bits_update(XXH3_state_t* state, const void* data, size_t size) noexcept nogil
    void marble_xxh3_name(const XXH3_state_t* state, unsigned char* out) noexcept nogil


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


@cython.final
cdef class Xxh3:
    cdef XXH3_state_t* state

    def __cinit__(self):
        self.state = XXH3_createState()
        if self.state == NULL:
            raise MemoryError
        XXH3_64bits_reset(self.state)

    def __dealloc__(self):
        XXH3_freeState(self.state)

    def update(self, data):
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                XXH3_64bits_update(self.state, view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    def digest(self):
        return XXH3_64bits_digest(self.state)


@cython.final
cdef class Xxh3Name:
    cdef XXH3_state_t* state

    def __cinit__(self):
        self.state = XXH3_createState()
        if self.state == NULL:
            raise MemoryError
        XXH3_128bits_reset(self.state)

    def __dealloc__(self):
        XXH3_freeState(self.state)

    def update(self, data):
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                XXH3_128bits_update(self.state, view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    def name(self):
        cdef unsigned char digest[16]
        marble_xxh3_name(self.state, digest)
        return (<bytes>digest[:16]).hex()
