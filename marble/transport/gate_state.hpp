// What one Flight server lets in, and what became of it. See _gate.pyx for the rules.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "arrow/flight/server.h"

namespace marble {

namespace fl = arrow::flight;
using arrow::Result;
using arrow::Status;

// A call's write while it waits for gRPC to take it: since when, in nanoseconds of the steady clock, or 0.
struct Writing {
  std::string peer;
  std::atomic<int64_t> since_ns{0};
};

// What one server lets in, and what became of it. Shared by its calls; outlives the server, so that it can be asked at any time.
struct GateState {
  int64_t message_bytes_max = 0;   // of one gRPC message
  int64_t unpacked_bytes_max = 0;  // of one record batch, and of all dictionaries of a stream, decompressed
  int64_t schema_bytes_max = 0;    // of the message with a stream's schema
  bool reuse_port = false;         // whether another server may listen on the same port
  std::atomic<int64_t> refused{0};
  std::atomic<int> builder{0};     // 0 not tried, 1 set, -1 not the gRPC that we know: nothing was touched
  std::atomic<int> reader{0};      // the same of a call's reader
  std::mutex mutex;                // guards the next
  std::set<const Writing*> writings;
};

inline std::mutex& GatesMutex() {
  static std::mutex mutex;
  return mutex;
}

inline std::map<int64_t, std::shared_ptr<GateState>>& Gates() {
  static std::map<int64_t, std::shared_ptr<GateState>> gates;
  return gates;
}

inline std::shared_ptr<GateState> FindGate(int64_t id) {
  const std::lock_guard<std::mutex> lock(GatesMutex());
  const auto found = Gates().find(id);
  return found == Gates().end() ? nullptr : found->second;
}

}  // namespace marble
