// One published state of a memtable, and reading from it.
//
// Layout: a list of runs, newest first; of a key's refs the one in the newest run counts.
// Ownership: a state shares its runs and its layout; whoever holds a state can read it for as long as it likes.
// Thread safety: immutable; every function may run in any number of threads at once, without the GIL.
// Invariants:
//   1. No run is empty. The last (oldest) one has no tombstone, unless the memtable keeps them for older rows elsewhere.
//   2. Rows that refs name exist in their sources; sources hold rows that passed full validation.
//   3. All keys of all runs begin with the same `shape.skip` bytes, and all words start behind these.
#pragma once

#include "gather.hpp"
#include "key_codec.hpp"
#include "lookup.hpp"
#include "memtable_run.hpp"

#include <arrow/array/array_primitive.h>
#include <arrow/array/validate.h>
#include <arrow/record_batch.h>
#include <arrow/type.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace marble {

// What a table looks like: fixed for its life.
struct Layout {
  std::shared_ptr<arrow::Schema> schema;
  std::shared_ptr<arrow::Schema> get_schema;  // As `schema`, but columns outside of the key are nullable.
  std::vector<int> key;                       // Key columns by position in `schema`, in key order.
  std::shared_ptr<const KeyCodec> codec;
  bool whole = false;  // Whether a key's word is all of the key.

  static arrow::Status Make(std::shared_ptr<arrow::Schema> schema, const std::vector<std::string>& key_names,
                            std::shared_ptr<const Layout>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      auto layout = std::make_shared<Layout>();
      arrow::FieldVector key_fields;
      arrow::FieldVector get_fields;
      for (const std::string& name : key_names) {
        const std::vector<int> found = schema->GetAllFieldIndices(name);
        if (found.size() != 1) {
          return arrow::Status::Invalid("key column '", name, "' is not ", found.empty() ? "a" : "a single",
                                        " column of the table");
        }
        for (const int column : layout->key) {
          if (column == found[0]) return arrow::Status::Invalid("key column '", name, "' is named twice");
        }
        layout->key.push_back(found[0]);
        key_fields.push_back(schema->field(found[0]));
      }
      for (int i = 0; i < schema->num_fields(); ++i) {
        const auto& field = schema->field(i);
        if (schema->GetAllFieldIndices(field->name()).size() > 1) {
          return arrow::Status::Invalid("column '", field->name(), "' is there twice");
        }
        ARROW_RETURN_NOT_OK(CheckStorable(*field->type(), field->name()));
        bool in_key = false;
        for (const int column : layout->key) in_key = in_key || column == i;
        get_fields.push_back(in_key ? field : field->WithNullable(true));
      }
      ARROW_RETURN_NOT_OK(KeyCodec::Make(arrow::schema(std::move(key_fields)), &layout->codec));
      layout->whole = layout->codec->width() > 0 && layout->codec->width() <= 8;
      layout->get_schema = arrow::schema(std::move(get_fields), schema->metadata());
      layout->schema = std::move(schema);
      *out = std::move(layout);
      return arrow::Status::OK();
    });
  }

  // Where in the key a column stands, by position in `schema`; -1 if it does not belong to it.
  int PositionInKey(int column) const noexcept {
    const auto at = std::find(key.begin(), key.end(), column);
    return at == key.end() ? -1 : static_cast<int>(at - key.begin());
  }

  arrow::Status CheckBatch(const arrow::RecordBatch& batch) const {
    if (batch.schema().get() != schema.get()) {
      if (batch.num_columns() != schema->num_fields()) {
        return arrow::Status::Invalid("the table has ", schema->num_fields(), " columns, the batch ",
                                      batch.num_columns());
      }
      for (int i = 0; i < batch.num_columns(); ++i) {
        const auto& expected = *schema->field(i);
        const auto& got = *batch.schema()->field(i);
        if (expected.name() != got.name() || !expected.type()->Equals(*got.type())) {
          return arrow::Status::Invalid("column ", i, " of the table is '", expected.name(), "' of type ",
                                        expected.type()->ToString(), ", of the batch '", got.name(), "' of type ",
                                        got.type()->ToString());
        }
      }
    }
    for (int i = 0; i < batch.num_columns(); ++i) {
      const auto data = batch.column_data(i);
      if (data->length != batch.num_rows() || !data->type->Equals(*schema->field(i)->type())) {
        return arrow::Status::Invalid("column '", schema->field(i)->name(), "' is not as its batch says");
      }
      ARROW_RETURN_NOT_OK(arrow::internal::ValidateArray(*data));
    }
    return arrow::Status::OK();
  }
};

// Where a lookup ended: `run` is -1 where no run has the key.
struct Hit {
  int32_t run = -1;
  uint64_t ref = 0;
  bool live() const noexcept { return run >= 0 && (ref & kTombstone) == 0; }
};

struct State {
  std::shared_ptr<const Layout> layout;
  std::vector<std::shared_ptr<const Run>> runs;
  KeyShape shape;
  std::shared_ptr<const std::string> start;  // The `shape.skip` bytes that all keys begin with, and maybe more.
  int reshapes = 0;                          // How often `shape.skip` has fallen while it was dear; see Reshape.
  uint64_t index = 0;

  // Finds the newest ref of each key in runs[first_run...].
  std::vector<Hit> Find(const std::vector<KeyView>& keys, size_t first_run) const {
    std::vector<Hit> hits(keys.size());
    std::vector<uint32_t> open;
    open.reserve(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      if (shape.whole || keys[i].data != nullptr) open.push_back(static_cast<uint32_t>(i));
    }
    std::vector<uint32_t> asked;
    std::vector<KeyView> asked_keys;
    std::vector<size_t> positions(keys.size());
    for (size_t r = first_run; r < runs.size() && !open.empty(); ++r) {
      const Run& run = *runs[r];
      const uint64_t first = run.words[0];
      const uint64_t last = run.words[run.size - 1];
      asked.clear();
      asked_keys.clear();
      for (const uint32_t i : open) {
        if (keys[i].word < first || keys[i].word > last) continue;
        asked.push_back(i);
        asked_keys.push_back(keys[i]);
      }
      FindKeys(run, asked_keys.data(), asked.size(), shape, positions.data());
      bool found = false;
      for (size_t i = 0; i < asked.size(); ++i) {
        if (positions[i] == run.size) continue;
        hits[asked[i]] = {static_cast<int32_t>(r), run.refs[positions[i]]};
        found = true;
      }
      if (found) std::erase_if(open, [&hits](uint32_t i) { return hits[i].run >= 0; });
    }
    return hits;
  }

  // Finds the newest ref of one key, without allocating.
  Hit FindOne(const uint8_t* key, uint64_t size) const noexcept {
    const KeyView view = ViewKey(key, size);
    if (!shape.whole && view.data == nullptr) return {};
    for (size_t r = 0; r < runs.size(); ++r) {
      const Run& run = *runs[r];
      if (view.word < run.words[0] || view.word > run.words[run.size - 1]) continue;
      size_t at = LowerBoundWordAlone(run.words.get(), run.size, view.word);
      if (run.words[at] != view.word) continue;
      if (!shape.whole) {
        at = LowerBoundTail(run, at, view, shape);
        if (at == run.size || Compare(run.Key(at, shape), view, shape) != 0) continue;
      }
      return {static_cast<int32_t>(r), run.refs[at]};
    }
    return {};
  }

  // Rows that run `r` added to, or took from, what the older runs hold.
  int64_t CountDelta(size_t r) const {
    constexpr size_t kChunk = 8192;
    const Run& run = *runs[r];
    int64_t delta = 0;
    std::vector<KeyView> keys;
    for (size_t first = 0; first < run.size; first += kChunk) {
      const size_t end = std::min(run.size, first + kChunk);
      keys.clear();
      for (size_t i = first; i < end; ++i) keys.push_back(run.Key(i, shape));
      const std::vector<Hit> hits = Find(keys, r + 1);
      for (size_t i = first; i < end; ++i) {
        const bool is = (run.refs[i] & kTombstone) == 0;
        delta += (is ? 1 : 0) - (hits[i - first].live() ? 1 : 0);
      }
    }
    return delta;
  }

  arrow::Status CountRows(int64_t* out) const noexcept {
    return Guarded([&]() -> arrow::Status {
      int64_t rows = 0;
      for (size_t r = runs.size(); r-- > 0;) {
        int64_t delta = runs[r]->delta.load(std::memory_order_relaxed);
        if (delta == Run::kUnknown) {
          delta = CountDelta(r);
          runs[r]->delta.store(delta, std::memory_order_relaxed);
        }
        rows += delta;
      }
      *out = rows;
      return arrow::Status::OK();
    });
  }

  arrow::Status CountBytes(uint64_t* out) const noexcept;

  // Entries of all runs: at least as many as there are rows and tombstones.
  uint64_t CountEntries() const noexcept {
    uint64_t entries = 0;
    for (const auto& run : runs) entries += run->size;
    return entries;
  }

  // About how many bytes rows, keys and runs have. Quick: whole allocations behind slices are not looked at.
  uint64_t AboutBytes() const noexcept {
    uint64_t bytes = 0;
    for (const auto& run : runs) {
      bytes += run->size * 16;
      for (const Slot& slot : run->slots) {
        if (slot.source == nullptr) continue;
        bytes += static_cast<uint64_t>(slot.source->bytes);
        if (slot.source->keys != nullptr) bytes += slot.source->keys->nbytes();
        if (slot.source->indexes != nullptr) bytes += static_cast<uint64_t>(slot.source->rows) * 8;
      }
    }
    return bytes;
  }

  arrow::Status GetMany(const arrow::RecordBatch& keys, std::shared_ptr<arrow::RecordBatch>* out,
                        std::shared_ptr<arrow::Array>* found) const noexcept {
    return Guarded([&]() -> arrow::Status {
      std::shared_ptr<const KeyColumn> encoded;
      ARROW_RETURN_NOT_OK(layout->codec->Encode(keys, &encoded));
      Lookup lookup(static_cast<size_t>(encoded->rows));
      const std::vector<Hit> hits = Find(ViewKeys(*encoded), 0);
      for (size_t i = 0; i < hits.size(); ++i) {
        if (hits[i].live()) lookup.Put(i, SourceOf(hits[i]), RowOf(hits[i].ref));
      }
      std::vector<int> columns(static_cast<size_t>(layout->schema->num_fields()));
      std::iota(columns.begin(), columns.end(), 0);
      return lookup.Gather(*layout->get_schema, layout->key, keys, columns, out, found);
    });
  }

  const Source* SourceOf(const Hit& hit) const noexcept {
    return runs[static_cast<size_t>(hit.run)]->slots[SlotOf(hit.ref)].source.get();
  }

  // A key as the runs know it. One that does not begin as all the table's keys do is in no run: its view has no data.
  KeyView ViewKey(const uint8_t* key, uint64_t size) const noexcept {
    if (shape.skip > 0 && (size < shape.skip || std::memcmp(key, start->data(), shape.skip) != 0)) {
      return {0, nullptr, 0};
    }
    return {WordOf(key, size, shape.skip), key, size};
  }
  KeyView ViewKey(const KeyColumn& keys, int64_t row) const noexcept {
    const uint64_t size = keys.size(row);
    if (shape.skip > 0 && (size < shape.skip || std::memcmp(keys.data(row), start->data(), shape.skip) != 0)) {
      return {0, nullptr, 0};
    }
    return {keys.Word(row, shape.skip), keys.data(row), size};
  }

  std::vector<KeyView> ViewKeys(const KeyColumn& keys) const {
    std::vector<KeyView> views;
    views.reserve(static_cast<size_t>(keys.rows));
    for (int64_t row = 0; row < keys.rows; ++row) views.push_back(ViewKey(keys, row));
    return views;
  }
};

// Adds the buffers behind an array, each as the whole allocation that it keeps alive.
inline void AddBuffers(const arrow::ArrayData& array, std::unordered_map<const uint8_t*, uint64_t>* buffers) {
  for (const auto& buffer : array.buffers) {
    if (buffer == nullptr) continue;
    const arrow::Buffer* root = buffer.get();
    while (root->parent() != nullptr) root = root->parent().get();
    uint64_t& size = (*buffers)[root->data()];
    size = std::max(size, static_cast<uint64_t>(root->capacity()));
  }
  for (const auto& child : array.child_data) AddBuffers(*child, buffers);
}

inline arrow::Status State::CountBytes(uint64_t* out) const noexcept {
  return Guarded([&]() -> arrow::Status {
    uint64_t total = 0;
    std::unordered_map<const uint8_t*, uint64_t> buffers;
    for (const auto& run : runs) {
      total += sizeof(Run) + run->size * 16 + run->slots.size() * (sizeof(Slot) + sizeof(Source));
      for (const Slot& slot : run->slots) {
        if (slot.source == nullptr) continue;
        if (slot.source->keys != nullptr) total += slot.source->keys->nbytes();
        if (slot.source->indexes != nullptr) total += static_cast<uint64_t>(slot.source->rows) * 8;
        for (const auto& column : slot.source->columns) AddBuffers(*column, &buffers);
      }
    }
    for (const auto& [data, size] : buffers) total += size;
    *out = total;
    return arrow::Status::OK();
  });
}

}  // namespace marble
