// What Arrow's Flight server does not let Python set, put between the server and gRPC. See _gate.pyx for the rules.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "arrow/flight/transport.h"
#include "arrow/flight/transport_server.h"
#include "arrow/util/uri.h"
#include "gate_builder.hpp"
#include "gate_messages.hpp"
#include "gate_state.hpp"
#include "gate_timers.hpp"

namespace marble {

// -- the server in between ----------------------------------------------------------------------------------------------------

// Hands every call on to `base`, with readers that look before they unpack.
class Gate final : public fl::FlightServerBase {
 public:
  Gate(fl::FlightServerBase* base, std::shared_ptr<GateState> state) : base_(base), state_(std::move(state)) {}

  Status ListFlights(const fl::ServerCallContext& context, const fl::Criteria* criteria,
                     std::unique_ptr<fl::FlightListing>* listings) override {
    return base_->ListFlights(context, criteria, listings);
  }
  Status GetFlightInfo(const fl::ServerCallContext& context, const fl::FlightDescriptor& request,
                       std::unique_ptr<fl::FlightInfo>* info) override {
    return base_->GetFlightInfo(context, request, info);
  }
  Status PollFlightInfo(const fl::ServerCallContext& context, const fl::FlightDescriptor& request,
                        std::unique_ptr<fl::PollInfo>* info) override {
    return base_->PollFlightInfo(context, request, info);
  }
  Status GetSchema(const fl::ServerCallContext& context, const fl::FlightDescriptor& request,
                   std::unique_ptr<fl::SchemaResult>* schema) override {
    return Plain(base_->GetSchema(context, request, schema));
  }
  Status DoGet(const fl::ServerCallContext& context, const fl::Ticket& request,
               std::unique_ptr<fl::FlightDataStream>* stream) override {
    ARROW_RETURN_NOT_OK(base_->DoGet(context, request, stream));
    if (*stream != nullptr) *stream = std::make_unique<TimedStream>(std::move(*stream), state_, context.peer());
    return Status::OK();
  }
  Status DoAction(const fl::ServerCallContext& context, const fl::Action& action,
                  std::unique_ptr<fl::ResultStream>* result) override {
    return base_->DoAction(context, action, result);
  }
  Status ListActions(const fl::ServerCallContext& context, std::vector<fl::ActionType>* actions) override {
    return base_->ListActions(context, actions);
  }
  Status DoPut(const fl::ServerCallContext& context, std::unique_ptr<fl::FlightMessageReader> reader,
               std::unique_ptr<fl::FlightMetadataWriter> writer) override {
    const auto filter = Watch(reader.get());
    if (filter != nullptr && !filter->violation().empty()) return Told(Status::OK(), filter.get());
    auto timed = std::make_unique<TimedMetadataWriter>(std::move(writer), state_, context.peer());
    return Told(base_->DoPut(context, std::move(reader), std::move(timed)), filter.get());
  }
  Status DoExchange(const fl::ServerCallContext& context, std::unique_ptr<fl::FlightMessageReader> reader,
                    std::unique_ptr<fl::FlightMessageWriter> writer) override {
    const auto filter = Watch(reader.get());
    if (filter != nullptr && !filter->violation().empty()) return Told(Status::OK(), filter.get());
    auto timed = std::make_unique<TimedMessageWriter>(std::move(writer), state_, context.peer());
    return Told(base_->DoExchange(context, std::move(reader), std::move(timed)), filter.get());
  }

 private:
  // With an error from this one method pyarrow sends a traceback along, with the paths of this machine.
  static Status Plain(const Status& status) { return status.ok() ? status : Status(status.code(), status.message()); }

  // The reader is freed inside the call that it is given to, so the filter, which the caller holds, outlives it.
  std::unique_ptr<Filter> Watch(fl::FlightMessageReader* reader) {
    fl::internal::TransportDataStream** stream = FindStream(reader);
    const int64_t first = stream == nullptr ? -1 : FirstHeaderBytes(stream);
    state_->reader.store(first < 0 ? -1 : 1);
    if (stream == nullptr) return nullptr;
    auto filter = std::make_unique<Filter>(*stream, state_.get());
    filter->TakesSchema(first);
    *stream = filter.get();
    return filter;
  }

  static Status Told(Status status, const Filter* filter) {
    if (filter == nullptr || filter->violation().empty()) return status;
    const std::string& why = filter->violation();
    return fl::MakeFlightError(fl::FlightStatusCode::Failed, why, "{\"code\": \"usage\", \"message\": \"" + why + "\"}");
  }

  fl::FlightServerBase* base_;
  std::shared_ptr<GateState> state_;
};

// Flight's own gRPC transport with a gate before it. Its URI is Flight's, but for the scheme and the gate's number behind it.
class GateTransport final : public fl::internal::ServerTransport {
 public:
  using fl::internal::ServerTransport::ServerTransport;

  Status Init(const fl::FlightServerOptions& options, const arrow::util::Uri& uri) override {
    std::string text = uri.ToString();
    const size_t scheme = text.find("://");
    const size_t query = text.find("?gate=");
    if (scheme == std::string::npos || query == std::string::npos) return Status::Invalid("not the location of a gate: ", text);
    const auto state = FindGate(std::stoll(text.substr(query + 6)));
    if (state == nullptr) return Status::Invalid("there is no such gate: ", text);
    const std::string inner_scheme = text.substr(0, scheme) == "marble+tls" ? "grpc+tls" : "grpc";
    const std::string inner_text = inner_scheme + text.substr(scheme, query - scheme);
    gate_ = std::make_unique<Gate>(base_, state);
    ARROW_ASSIGN_OR_RAISE(inner_, fl::internal::GetDefaultTransportRegistry()->MakeServer(inner_scheme, gate_.get(), memory_manager_));
    fl::FlightServerOptions inner_options = options;
    inner_options.builder_hook = [state](void* builder) { state->builder.store(SetBuilder(builder, *state) ? 1 : -1); };
    arrow::util::Uri inner_uri;
    ARROW_RETURN_NOT_OK(inner_uri.Parse(inner_text));
    return inner_->Init(inner_options, inner_uri);
  }
  Status Shutdown() override { return inner_->Shutdown(); }
  Status Shutdown(const std::chrono::system_clock::time_point& deadline) override { return inner_->Shutdown(deadline); }
  Status Wait() override { return inner_->Wait(); }
  fl::Location location() const override { return inner_->location(); }

 private:
  std::unique_ptr<Gate> gate_;
  std::unique_ptr<fl::internal::ServerTransport> inner_;  // goes first: its calls use the gate
};

inline Status RegisterGates() {
  auto* registry = fl::internal::GetDefaultTransportRegistry();
  for (const char* scheme : {"marble", "marble+tls"}) {
    ARROW_RETURN_NOT_OK(registry->RegisterServer(
        scheme, [](fl::FlightServerBase* base, std::shared_ptr<arrow::MemoryManager> manager) -> Result<std::unique_ptr<fl::internal::ServerTransport>> {
          return std::make_unique<GateTransport>(base, std::move(manager));
        }));
  }
  return Status::OK();
}

inline void AddGate(int64_t id, int64_t message_bytes_max, int64_t unpacked_bytes_max, int64_t schema_bytes_max, bool reuse_port) {
  auto state = std::make_shared<GateState>();
  state->message_bytes_max = message_bytes_max;
  state->unpacked_bytes_max = unpacked_bytes_max;
  state->schema_bytes_max = schema_bytes_max;
  state->reuse_port = reuse_port;
  const std::lock_guard<std::mutex> lock(GatesMutex());
  Gates()[id] = std::move(state);
}

inline void DropGate(int64_t id) {
  const std::lock_guard<std::mutex> lock(GatesMutex());
  Gates().erase(id);
}

// Refused messages, and whether builder and reader were those that we know. Zeros for a gate that is not there.
inline void AskGate(int64_t id, int64_t* refused, int* builder, int* reader) {
  const auto state = FindGate(id);
  *refused = state == nullptr ? 0 : state->refused.load();
  *builder = state == nullptr ? 0 : state->builder.load();
  *reader = state == nullptr ? 0 : state->reader.load();
}

// Who has kept a write waiting for longer than `seconds`, as gRPC names them.
inline std::vector<std::string> SlowPeers(int64_t id, double seconds) {
  std::vector<std::string> peers;
  const auto state = FindGate(id);
  if (state == nullptr) return peers;
  const int64_t before = NowNs() - static_cast<int64_t>(seconds * 1e9);
  const std::lock_guard<std::mutex> lock(state->mutex);
  for (const Writing* writing : state->writings) {
    const int64_t since = writing->since_ns.load();
    if (since != 0 && since < before) peers.push_back(writing->peer);
  }
  return peers;
}

}  // namespace marble
