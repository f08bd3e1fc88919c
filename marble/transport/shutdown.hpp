// How pyarrow 26 lays out a Python Flight server, as far as we reach into it. See _shutdown.pyx.
#pragma once

#include <Python.h>

#include <chrono>
#include <memory>

#include "arrow/flight/server.h"
#include "arrow/python/flight.h"

// `cdef class FlightServerBase(_Weakrefable)` of pyarrow/_flight.pyx. Its size is compared with the real one at import.
// It stands outside our namespace because Cython names it without one.
struct MarbleFlightServerObject {
  PyObject_HEAD
  PyObject* weakrefs;
  void* methods;
  std::shared_ptr<arrow::py::flight::PyFlightServer> server;
  PyObject* finalizer;
};

namespace marble {

inline arrow::Status ShutDownWithin(arrow::flight::FlightServerBase* server, double seconds) {
  const auto grace = std::chrono::duration_cast<std::chrono::system_clock::duration>(std::chrono::duration<double>(seconds));
  const auto deadline = std::chrono::system_clock::now() + grace;
  return server->Shutdown(&deadline);
}

}  // namespace marble
