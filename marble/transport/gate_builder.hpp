// Settings of gRPC's server that Flight does not pass on. See _gate.pyx for the rules.
#pragma once

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <string>

#include "arrow/flight/transport.h"
#include "gate_state.hpp"

namespace marble {

// -- looking at memory that may not be there ------------------------------------------------------------------------------

// Copies `bytes` (4096 at most) from `from`, if all of it is mapped: the kernel answers EFAULT where we would crash.
inline bool Peek(const void* from, void* to, size_t bytes) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return false;
  const bool good = write(ends[1], from, bytes) == static_cast<ssize_t>(bytes) &&
                    read(ends[0], to, bytes) == static_cast<ssize_t>(bytes);
  close(ends[0]);
  close(ends[1]);
  return good;
}

template <typename T>
bool Peek(const void* from, T* to) {
  return Peek(from, static_cast<void*>(to), sizeof(T));
}

// Whether `address` lies in the library that has Arrow Flight.
inline bool InFlightLibrary(const void* address) {
  Dl_info here;
  Dl_info there;
  const auto known = reinterpret_cast<const void*>(&fl::internal::GetDefaultTransportRegistry);
  return dladdr(known, &there) != 0 && dladdr(address, &here) != 0 && here.dli_fbase == there.dli_fbase;
}

// -- gRPC's builder ---------------------------------------------------------------------------------------------------------

struct VectorMirror {
  char* begin;
  char* end;
  char* capacity;
};

// grpc::ServerBuilder, whose header is not in the wheel: as in the gRPC of pyarrow 26.0.1. Never constructed.
struct BuilderMirror {
  void* vtable;
  int max_receive_message_size;
  int max_send_message_size;
  VectorMirror options;
  VectorMirror services;
  VectorMirror ports;
  VectorMirror passive_listeners;
  int cqs_number;
  int pollers_min;
  int pollers_max;
  int cq_timeout_ms;
  VectorMirror cqs;
  void* credentials[2];
  VectorMirror plugins;
  void* resource_quota;
  void* generic_services_and_allocators[5];
  int default_level[2];
  int default_algorithm[2];
  uint32_t enabled_algorithms;
};

// The option that grpc::MakeChannelArgumentOption(name, int) makes.
struct IntOptionMirror {
  void* vtable;
  std::string name;
  int value;
};

constexpr char kReusePort[] = "grpc.so_reuseport";
constexpr uint32_t kAllAlgorithms = 7;  // none, deflate, gzip
constexpr uint32_t kNoCompression = 1;

// Sets what Flight has no setting for. Everything is read through the kernel and compared with what Flight has just set,
// before anything is written; false, and nothing is touched, if any of it is not as it must be.
inline bool SetBuilder(void* raw, const GateState& state) {
  static_assert(sizeof(IntOptionMirror) == 48);
  alignas(BuilderMirror) char copy[sizeof(BuilderMirror)];
  if (!Peek(raw, copy, sizeof(copy))) return false;
  const auto& seen = *reinterpret_cast<const BuilderMirror*>(copy);
  const bool as_known = InFlightLibrary(seen.vtable) && seen.max_receive_message_size == -1 &&
                        (seen.max_send_message_size == -1 || seen.max_send_message_size == INT_MIN) &&
                        seen.options.end - seen.options.begin == sizeof(void*) &&
                        seen.services.end - seen.services.begin == sizeof(void*) &&
                        seen.ports.end - seen.ports.begin == 56 && seen.cqs_number == 1 && seen.pollers_min >= 1 &&
                        seen.pollers_max >= seen.pollers_min && seen.cq_timeout_ms == 10000 &&
                        seen.passive_listeners.begin == seen.passive_listeners.end &&
                        seen.cqs.begin == seen.cqs.end && seen.resource_quota == nullptr && seen.enabled_algorithms == kAllAlgorithms;
  if (!as_known) return false;
  // The one option is Flight's: no port is to be shared.
  char* option = nullptr;
  alignas(IntOptionMirror) char body[sizeof(IntOptionMirror)];
  if (!Peek(seen.options.begin, &option) || !Peek(option, body, sizeof(body))) return false;
  struct {
    void* vtable;
    const char* text;
    size_t size;
    char rest[16];
    int value;
  } parts;
  std::memcpy(&parts, body, sizeof(body));
  char name[sizeof(kReusePort)] = {};
  if (!InFlightLibrary(parts.vtable) || parts.size != sizeof(kReusePort) - 1 || parts.value != 0) return false;
  if (!Peek(parts.text, name, sizeof(kReusePort) - 1) || std::strcmp(name, kReusePort) != 0) return false;

  auto* builder = static_cast<BuilderMirror*>(raw);
  builder->max_receive_message_size = static_cast<int>(state.message_bytes_max);
  // A message that gRPC unpacks would be measured before it is unpacked only. Arrow's own compression is for record batches.
  builder->enabled_algorithms = kNoCompression;
  reinterpret_cast<IntOptionMirror*>(option)->value = state.reuse_port ? 1 : 0;
  return true;
}

}  // namespace marble
