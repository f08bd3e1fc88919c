# distutils: language = c++
"""Limits on what comes in at a Flight server that Arrow has no setting for, or applies too late.

- One gRPC message has at most so many bytes: Arrow sets no limit, and gRPC gathers a whole message before anybody sees it.
- gRPC's own compression is refused: its limit looks at a message before it is unpacked, not at what comes out.
- A record batch unpacks to at most so many bytes: the lengths that stand before each compressed buffer are added up before
  Arrow allocates and unpacks them.
- A schema has at most so many bytes as a message, since Arrow makes objects of each field that take many times what it takes there.
  One that comes in a call's first message has been decoded by then: that call ends at once, before its handler begins.
- A client that does not read what it asked for is seen: `slow` names those who have kept a write waiting.
- An error from `get_schema` reaches the client without the traceback that pyarrow makes of it.
- Two servers of one process may listen on one port (SO_REUSEPORT), so that one can take over from the other.

How: Arrow's registry of transports (`arrow/flight/transport.h`) is given two schemes of ours, ``marble`` and ``marble+tls``. Behind
them is Arrow's own gRPC transport, with a server in between that hands every call on. That server has two places to act at:

1. Arrow's ``builder_hook`` gives it gRPC's builder. gRPC's headers are not in the wheel, so `BuilderMirror` repeats the layout.
2. A call's reader holds a pointer to the stream it reads from; a `Filter` takes its place.

Layout: both rest on the layout of private classes, tried with pyarrow 26.0.1. Nothing is believed of it: memory is read through the
kernel (which answers where a wild pointer would crash), and compared with all that Arrow must have put there (limits, names of
options, types, the library that vtables lie in), before one value is written. If anything is not as it must be, nothing is
touched, and `ask` says so: the server then works as Arrow's own, with Arrow's limits.
Ownership: a gate's numbers are kept from `add` until `drop`; a server keeps its own share of them.
Thread safety: all functions may be called from any thread. The filter of a call is used by that call's thread alone.

Invariants:
1. What a `Filter` refuses is never handed to Arrow's decoder; the call ends with an error that says why.
2. No byte of a stranger's header is read without a check of its place.
"""
from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "arrow/api.h" namespace "arrow" nogil:
    cdef cppclass CStatus "arrow::Status":
        cbool ok()
        string ToString()


cdef extern from "gate.hpp" namespace "marble" nogil:
    CStatus RegisterGates()
    void AddGate(
        int64_t id, int64_t message_bytes_max, int64_t unpacked_bytes_max, int64_t schema_bytes_max, cbool reuse_port
    ) except +
    void DropGate(int64_t id) except +
    vector[string] SlowPeers(int64_t id, double seconds) except +
    void AskGate(int64_t id, int64_t* refused, int* builder, int* reader) except +


def register():
    """Tell Arrow of the schemes ``marble`` and ``marble+tls``. Once in a process."""
    cdef CStatus status = RegisterGates()
    if not status.ok():
        raise RuntimeError(status.ToString().decode("utf-8", "replace"))


def add(int64_t number, int64_t message_bytes_max, int64_t unpacked_bytes_max, int64_t schema_bytes_max, bint reuse_port):
    """Make gate `number`: the location of its server ends in ``?gate=number``."""
    AddGate(number, message_bytes_max, unpacked_bytes_max, schema_bytes_max, reuse_port)


def drop(int64_t number):
    """Forget gate `number`. Its server, if it still runs, keeps its limits."""
    DropGate(number)


def ask(int64_t number):
    """Refused messages; whether gRPC's builder and the last call's reader were as known: 1 yes, -1 no, 0 there was none."""
    cdef int64_t refused = 0
    cdef int builder = 0
    cdef int reader = 0
    AskGate(number, &refused, &builder, &reader)
    return refused, builder, reader


def slow(int64_t number, double seconds):
    """Who has kept a write of this gate's server waiting for longer than `seconds`, as gRPC names them."""
    cdef vector[string] peers = SlowPeers(number, seconds)
    return [peer.decode("utf-8", "replace") for peer in peers]
