// One table's rows where they lie in memtables and in files, read as one.
//
// Layout: sources newest first: states of memtables, then levels. A level is files whose keys do not overlap, in key
// order; a file that overlaps others is a level of its own. Of a key's versions the one in the newest source counts.
// Ownership: a reader shares states and files; scans share them with it. What they give out keeps mappings alive.
// Thread safety: immutable; every function may run in any number of threads at once, without the GIL.
// Invariants:
//   1. All sources are of one layout. The files of a level ascend, and so do the keys within them.
//   2. A block that cannot hold what is looked for is left out of a scan only if no older block that can lies in its
//      range of keys: its versions, tombstones too, may hide older ones.
#pragma once

#include "level.hpp"
#include "lookup.hpp"
#include "merge_cursor.hpp"
#include "point.hpp"
#include "sstable.hpp"

#include <arrow/array/concatenate.h>
#include <arrow/record_batch.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

using Levels = std::vector<Level>;  // Newest first.

// The blocks of one level between the bounds of a scan.
class LevelStream : public BlockStream {
 public:
  LevelStream(std::shared_ptr<const Levels> levels, size_t level, const ScanOptions& options)
      : levels_(std::move(levels)), level_(level), lower_(options.lower), upper_(options.upper),
        has_upper_(options.has_upper), reverse_(options.reverse), anew_(options.versions) {
    const std::vector<FilePtr>& files = this->files();
    if (!reverse_) {
      file_ = lower_.empty() ? 0 : (*levels_)[level_].FindFile(lower_);
      if (file_ < files.size()) block_ = lower_.empty() ? 0 : files[file_]->FindBlock(lower_);
      return;
    }
    file_ = files.size();
    if (has_upper_) {
      // Keys are below `upper`: the block that it would be in may begin with it, or above.
      file_ = (*levels_)[level_].FindFile(upper_);
      const size_t block = file_ < files.size() ? files[file_]->FindBlock(upper_) : 0;
      if (file_ < files.size() && files[file_]->first_key(block) < upper_) {
        block_ = block + 1;
        ++file_;
      } else if (block > 0) {
        block_ = block;
        ++file_;
      } else {
        block_ = file_ > 0 ? files[file_ - 1]->blocks() : 0;
      }
    } else if (file_ > 0) {
      block_ = files[file_ - 1]->blocks();
    }
  }

  arrow::Status Next(StreamBlock* out) override {
    *out = {};
    while (Stands()) {
      const TableFile& file = *files()[reverse_ ? file_ - 1 : file_];
      const size_t block = reverse_ ? block_ - 1 : block_;
      if (reverse_ ? file.last_key(block) < lower_ : has_upper_ && file.first_key(block) >= upper_) return End();
      if (MayLeaveOut(file, block)) {
        Step();
        continue;
      }
      ARROW_ASSIGN_OR_RAISE(std::shared_ptr<const Block> loaded, anew_ ? file.LoadAnew(block) : file.Load(block));
      Step();
      out->deleted = loaded->deleted;
      out->indexes = loaded->indexes->raw_values();
      const Source* source = &loaded->source;
      out->source = std::shared_ptr<const Source>(std::move(loaded), source);
      break;
    }
    return arrow::Status::OK();
  }

  std::string Start() const override {
    const std::string_view first = files().front()->first_key();
    return std::string(first.substr(0, CommonBytes(first, files().back()->last_key())));
  }

 private:
  const std::vector<FilePtr>& files() const noexcept { return (*levels_)[level_].files; }

  // Forward, [file_, block_] is the next block; in reverse it is the one before [file_ - 1, block_].
  bool Stands() const noexcept { return reverse_ ? file_ > 0 : file_ < files().size(); }

  void Step() noexcept {
    if (reverse_) {
      if (--block_ == 0 && --file_ > 0) block_ = files()[file_ - 1]->blocks();
    } else if (++block_ == files()[file_]->blocks()) {
      ++file_;
      block_ = 0;
    }
  }

  arrow::Status End() noexcept {
    file_ = reverse_ ? 0 : files().size();
    return arrow::Status::OK();
  }

  bool MayLeaveOut(const TableFile& file, size_t block) const noexcept {
    if ((*levels_)[level_].IsWanted(reverse_ ? file_ - 1 : file_, block)) return false;
    for (size_t older = level_ + 1; older < levels_->size(); ++older) {
      if ((*levels_)[older].HasWanted(file.first_key(block), file.last_key(block))) return false;
    }
    return true;
  }

  const std::shared_ptr<const Levels> levels_;
  const size_t level_;
  const std::string lower_;
  const std::string upper_;
  const bool has_upper_;
  const bool reverse_;
  const bool anew_;  // Versions go into new files: blocks are checked again, and others stay in the cache.
  size_t file_ = 0;
  size_t block_ = 0;
};

class LsmReader {
 public:
  using States = std::vector<std::shared_ptr<const State>>;

  static arrow::Status Make(States states, std::vector<std::vector<FilePtr>> levels,
                            std::shared_ptr<const LsmReader>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      auto reader = std::make_shared<LsmReader>();
      auto own = std::make_shared<Levels>();
      for (auto& files : levels) {
        if (!files.empty()) own->push_back({std::move(files), {}});
      }
      if (states.empty() && own->empty()) {
        return arrow::Status::Invalid("a table is read from at least one memtable or file");
      }
      reader->layout_ = states.empty() ? (*own)[0].files[0]->layout() : states[0]->layout;
      reader->states_ = std::move(states);
      reader->levels_ = std::move(own);
      ARROW_RETURN_NOT_OK(reader->CheckStates());
      ARROW_RETURN_NOT_OK(reader->CheckLevels());
      *out = std::move(reader);
      return arrow::Status::OK();
    });
  }

  // The same files behind other memtables: as quick with many files as with few.
  arrow::Status WithStates(States states, std::shared_ptr<const LsmReader>* out) const noexcept {
    return Guarded([&]() -> arrow::Status {
      auto reader = std::make_shared<LsmReader>(*this);
      reader->states_ = std::move(states);
      ARROW_RETURN_NOT_OK(reader->CheckStates());
      *out = std::move(reader);
      return arrow::Status::OK();
    });
  }

  const std::shared_ptr<const Layout>& layout() const noexcept { return layout_; }

  // Columns other than the key's are null where no row has the key.
  arrow::Status GetMany(const arrow::RecordBatch& keys, const std::vector<int>& columns,
                        std::shared_ptr<arrow::RecordBatch>* out, std::shared_ptr<arrow::Array>* found) const noexcept {
    return Guarded([&]() -> arrow::Status {
      std::shared_ptr<const KeyColumn> encoded;
      ARROW_RETURN_NOT_OK(layout_->codec->Encode(keys, &encoded));
      if (levels_->empty() || keys.num_rows() <= kGetKeys) return GetPart(keys, *encoded, columns, out, found);
      arrow::RecordBatchVector parts;
      arrow::ArrayVector founds;
      for (int64_t first = 0; first < keys.num_rows(); first += kGetKeys) {
        const auto part = keys.Slice(first, kGetKeys);
        ARROW_RETURN_NOT_OK(layout_->codec->Encode(*part, &encoded));
        parts.emplace_back();
        founds.emplace_back();
        ARROW_RETURN_NOT_OK(GetPart(*part, *encoded, columns, &parts.back(), &founds.back()));
      }
      ARROW_ASSIGN_OR_RAISE(*out, arrow::ConcatenateRecordBatches(parts));
      return arrow::Concatenate(founds).Value(found);
    });
  }

  // What the memtables say of an encoded key; false if none of them knows it.
  bool FindInMemory(const std::string& key, PointHit* out) const noexcept {
    for (const auto& state : states_) {
      const Hit hit = state->FindOne(reinterpret_cast<const uint8_t*>(key.data()), key.size());
      if (hit.run < 0) continue;
      if (hit.live()) *out = {state->SourceOf(hit), RowOf(hit.ref), nullptr};
      return true;
    }
    return false;
  }

  bool has_files() const noexcept { return !levels_->empty(); }

  // The row that the files have of an encoded key; what it says is in memory then.
  arrow::Status FindInFiles(const std::string& key, PointHit* out) const noexcept {
    return Guarded([&]() -> arrow::Status {
      const uint64_t hash = HashKey(key);
      for (const Level& level : *levels_) {
        const size_t at = level.files.size() == 1 ? 0 : level.FindFile(key);
        if (at == level.files.size()) continue;
        const TableFile& file = *level.files[at];
        size_t number = 0;
        // The filter says no most quickly, and the keys of runs mostly overlap.
        if (!file.MayContain(hash) || !file.FindRange(key, &number)) continue;
        file.Prefetch(number);
        std::shared_ptr<const Block> block = file.Cached(number);
        if (block == nullptr && file.HasParts(number) && FileParts::Visit(file.parts()[number])) {
          bool known = false;
          ARROW_RETURN_NOT_OK(FindInParts(file, number, key, &known, out));
          if (known) break;
          continue;
        }
        if (block == nullptr) {
          ARROW_ASSIGN_OR_RAISE(block, file.Load(number));
        }
        const int64_t row = block->FindExact(key);
        if (row < 0) continue;
        if (block->is_deleted(row)) break;
        const Source* source = &block->source;
        *out = {source, static_cast<uint32_t>(row), std::move(block)};
        TouchRow(*layout_->schema, *out);
        break;
      }
      return arrow::Status::OK();
    });
  }

  // `wanted` has for each level, for each of its files, which blocks can hold what is looked for; see Level.
  arrow::Status Scan(ScanOptions options, std::vector<std::vector<std::shared_ptr<arrow::Buffer>>> wanted,
                     std::shared_ptr<MergeCursor>* out) const noexcept {
    return Guarded([&]() -> arrow::Status {
      std::shared_ptr<const Levels> levels = levels_;
      if (!wanted.empty()) {
        auto own = std::make_shared<Levels>(*levels_);
        for (size_t i = 0; i < wanted.size(); ++i) (*own)[i].wanted = std::move(wanted[i]);
        levels = std::move(own);
      }
      MergeCursor::Streams streams;
      for (size_t i = 0; i < levels->size(); ++i) streams.push_back(std::make_unique<LevelStream>(levels, i, options));
      return MergeCursor::Make(layout_, states_, std::move(streams), std::move(options), out);
    });
  }

  arrow::Status CountRows(ScanOptions options, uint64_t* out) const noexcept {
    std::shared_ptr<MergeCursor> cursor;
    ARROW_RETURN_NOT_OK(Scan(std::move(options), {}, &cursor));
    ScanBatch batch;
    *out = 0;
    for (;;) {
      ARROW_RETURN_NOT_OK(cursor->Next(&batch));
      if (batch.rows == nullptr) return arrow::Status::OK();
      *out += static_cast<uint64_t>(batch.rows->num_rows());
    }
  }

 private:
  arrow::Status CheckLayout(const Layout& other) const {
    if (&other == layout_.get() || (other.schema->Equals(*layout_->schema) && other.key == layout_->key)) {
      return arrow::Status::OK();
    }
    return arrow::Status::Invalid("memtables and files are of different tables");
  }

  arrow::Status CheckStates() const {
    for (const auto& state : states_) ARROW_RETURN_NOT_OK(CheckLayout(*state->layout));
    return arrow::Status::OK();
  }

  arrow::Status CheckLevels() const {
    for (const Level& level : *levels_) {
      for (size_t i = 0; i < level.files.size(); ++i) {
        ARROW_RETURN_NOT_OK(CheckLayout(*level.files[i]->layout()));
        if (i > 0 && level.files[i - 1]->last_key() >= level.files[i]->first_key()) {
          return arrow::Status::Invalid("files ", level.files[i - 1]->name(), " and ", level.files[i]->name(),
                                        " of one level overlap or are out of order");
        }
      }
    }
    return arrow::Status::OK();
  }

  arrow::Status GetPart(const arrow::RecordBatch& keys, const KeyColumn& encoded, const std::vector<int>& columns,
                        std::shared_ptr<arrow::RecordBatch>* out, std::shared_ptr<arrow::Array>* found) const {
    const auto count = static_cast<size_t>(encoded.rows);
    Lookup lookup(count);
    std::vector<uint32_t> open(count);
    for (size_t i = 0; i < count; ++i) open[i] = static_cast<uint32_t>(i);
    for (const auto& state : states_) {
      if (open.empty()) break;
      if (!state->runs.empty()) FindInState(*state, encoded, &open, &lookup);
    }
    Held held;
    if (!open.empty() && !levels_->empty()) ARROW_RETURN_NOT_OK(FindInFiles(encoded, columns, &open, &lookup, &held));
    return lookup.Gather(*layout_->get_schema, layout_->key, keys, columns, out, found);
  }

  static void FindInState(const State& state, const KeyColumn& keys, std::vector<uint32_t>* open, Lookup* lookup) {
    std::vector<KeyView> views;
    views.reserve(open->size());
    for (const uint32_t i : *open) views.push_back(state.ViewKey(keys, i));
    const std::vector<Hit> hits = state.Find(views, 0);
    size_t left = 0;
    for (size_t i = 0; i < hits.size(); ++i) {
      if (hits[i].live()) lookup->Put((*open)[i], state.SourceOf(hits[i]), RowOf(hits[i].ref));
      if (hits[i].run < 0) (*open)[left++] = (*open)[i];
    }
    open->resize(left);
  }

  // `open` are keys by row. `held` keeps the blocks that the lookup refers to.
  arrow::Status FindInFiles(const KeyColumn& keys, const std::vector<int>& columns, std::vector<uint32_t>* open,
                            Lookup* lookup, Held* held) const {
    // In key order each file and each block is looked for once.
    std::vector<SortItem> items;
    items.reserve(open->size());
    for (const uint32_t row : *open) items.push_back({keys.Word(row, 0), row});
    std::vector<SortItem> scratch(items.size());
    SortKeys(keys, items.data(), scratch.data(), items.size(), 0);
    for (size_t i = 0; i < items.size(); ++i) (*open)[i] = items[i].row;
    std::vector<uint64_t> hashes(static_cast<size_t>(keys.rows));
    for (const uint32_t row : *open) hashes[row] = HashKey(ViewOf(keys, row));
    std::vector<bool> done(static_cast<size_t>(keys.rows));
    for (const Level& level : *levels_) {
      ARROW_RETURN_NOT_OK(FindInLevel(level, keys, hashes, *open, columns, lookup, held, &done));
      std::erase_if(*open, [&done](uint32_t row) { return done[row]; });
      if (open->empty()) break;
    }
    return arrow::Status::OK();
  }

  std::shared_ptr<const Layout> layout_;
  States states_;
  std::shared_ptr<const Levels> levels_;
};

}  // namespace marble
