// For how long calls have waited for their clients to read. See _gate.pyx for the rules.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gate_state.hpp"

namespace marble {

// -- writes that wait -----------------------------------------------------------------------------------------------------------

inline int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Lets the gate see for how long a call has waited for its client to read.
class Timer {
 public:
  Timer(std::shared_ptr<GateState> state, std::string peer) : state_(std::move(state)) {
    writing_.peer = std::move(peer);
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->writings.insert(&writing_);
  }
  ~Timer() {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->writings.erase(&writing_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  void Begin() { writing_.since_ns.store(NowNs()); }
  void End() { writing_.since_ns.store(0); }

  template <typename Write>
  auto Around(Write write) {
    Begin();
    auto result = write();
    End();
    return result;
  }

 private:
  std::shared_ptr<GateState> state_;
  Writing writing_;
};

// What a DoGet sends. Flight writes between two calls of `Next`, so that is what is timed.
class TimedStream final : public fl::FlightDataStream {
 public:
  TimedStream(std::unique_ptr<fl::FlightDataStream> inner, std::shared_ptr<GateState> state, std::string peer)
      : inner_(std::move(inner)), timer_(std::move(state), std::move(peer)) {}

  std::shared_ptr<arrow::Schema> schema() override { return inner_->schema(); }
  Result<fl::FlightPayload> GetSchemaPayload() override {
    auto payload = inner_->GetSchemaPayload();
    timer_.Begin();
    return payload;
  }
  Result<fl::FlightPayload> Next() override {
    timer_.End();
    auto payload = inner_->Next();
    timer_.Begin();
    return payload;
  }
  Status Close() override {
    timer_.End();
    return inner_->Close();
  }

 private:
  std::unique_ptr<fl::FlightDataStream> inner_;
  Timer timer_;
};

class TimedMetadataWriter final : public fl::FlightMetadataWriter {
 public:
  TimedMetadataWriter(std::unique_ptr<fl::FlightMetadataWriter> inner, std::shared_ptr<GateState> state, std::string peer)
      : inner_(std::move(inner)), timer_(std::move(state), std::move(peer)) {}

  Status WriteMetadata(const arrow::Buffer& metadata) override {
    return timer_.Around([&] { return inner_->WriteMetadata(metadata); });
  }

 private:
  std::unique_ptr<fl::FlightMetadataWriter> inner_;
  Timer timer_;
};

class TimedMessageWriter final : public fl::FlightMessageWriter {
 public:
  TimedMessageWriter(std::unique_ptr<fl::FlightMessageWriter> inner, std::shared_ptr<GateState> state, std::string peer)
      : inner_(std::move(inner)), timer_(std::move(state), std::move(peer)) {}

  Status Begin(const std::shared_ptr<arrow::Schema>& schema, const arrow::ipc::IpcWriteOptions& options) override {
    return timer_.Around([&] { return inner_->Begin(schema, options); });
  }
  Status WriteRecordBatch(const arrow::RecordBatch& batch) override {
    return timer_.Around([&] { return inner_->WriteRecordBatch(batch); });
  }
  Status WriteMetadata(std::shared_ptr<arrow::Buffer> metadata) override {
    return timer_.Around([&] { return inner_->WriteMetadata(std::move(metadata)); });
  }
  Status WriteWithMetadata(const arrow::RecordBatch& batch, std::shared_ptr<arrow::Buffer> metadata) override {
    return timer_.Around([&] { return inner_->WriteWithMetadata(batch, std::move(metadata)); });
  }
  Status Close() override { return inner_->Close(); }
  arrow::ipc::WriteStats stats() const override { return inner_->stats(); }

 private:
  std::unique_ptr<fl::FlightMessageWriter> inner_;
  Timer timer_;
};

}  // namespace marble
