// Looking keys up in the files of a level.
//
// Layout: a level is files whose keys do not overlap, in key order.
// Ownership: a Level shares its files; what a lookup refers to is kept alive by `Held`.
// Thread safety: pure functions but for the files' caches and memos.
// Invariants:
//   1. A block that is in the cache is read there. Else few rows are read alone where they can be (block_parts.hpp), and
//      only where many are asked for, or have been by and by, the block is read as a whole.
#pragma once

#include "lookup.hpp"
#include "memtable_run.hpp"
#include "merge_lanes.hpp"
#include "parts_lookup.hpp"
#include "point.hpp"
#include "sstable.hpp"

#include <arrow/buffer.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

constexpr int64_t kGetKeys = 4096;  // Keys whose blocks are held at a time.
constexpr size_t kRowsOfKey = 16;   // A block is read as a whole where more than one row in so many is asked for.

using FilePtr = std::shared_ptr<const TableFile>;

// Files with ascending keys that do not overlap. `wanted` has, for each file, a bit for each block: whether it can hold
// what is looked for; null where nothing is known.
struct Level {
  std::vector<FilePtr> files;
  std::vector<std::shared_ptr<arrow::Buffer>> wanted;

  // First file from `from` on whose last key is not below `key`.
  size_t FindFile(std::string_view key, size_t from = 0) const noexcept {
    size_t end = files.size();
    while (from < end) {
      const size_t middle = from + (end - from) / 2;
      if (files[middle]->last_key() < key) {
        from = middle + 1;
      } else {
        end = middle;
      }
    }
    return from;
  }

  bool IsWanted(size_t file, size_t block) const noexcept {
    return wanted.empty() || wanted[file] == nullptr ||
           arrow::bit_util::GetBit(wanted[file]->data(), static_cast<int64_t>(block));
  }

  // Whether a block that is wanted has keys in [first, last].
  bool HasWanted(std::string_view first, std::string_view last) const noexcept {
    size_t file = FindFile(first);
    if (file == files.size()) return false;
    for (size_t block = files[file]->FindBlock(first); file < files.size(); ++file, block = 0) {
      for (; block < files[file]->blocks(); ++block) {
        if (files[file]->first_key(block) > last) return false;
        if (IsWanted(file, block)) return true;
      }
    }
    return false;
  }
};

// A key that is looked for in a block.
struct BlockProbe {
  const Block* block = nullptr;
  std::string_view key;
  uint64_t word = 0;  // Eight bytes of `key`, behind those that all keys of the block begin with.
  uint32_t row = 0;   // Of `key` among the keys that are looked up.
  int64_t at = 0;
  int64_t size = 0;
  int64_t found = -1;  // The key's row in the block, or -1.
};

// Looks all probes up at the same time: each step waits for memory, and so they wait together.
inline void FindInBlocks(BlockProbe* probes, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) probes[i].size = probes[i].block->size();
  for (bool more = true; more;) {
    more = false;
    for (size_t i = 0; i < count; ++i) {
      BlockProbe& probe = probes[i];
      if (probe.size <= 1) continue;
      const int64_t half = probe.size / 2;
      const bool below = probe.block->words[static_cast<size_t>(probe.at + half - 1)] < probe.word;
      // The step is masked, not chosen: which way it goes cannot be predicted.
      probe.at += half & (int64_t{0} - (below ? 1 : 0));
      probe.size -= half;
      more = more || probe.size > 1;
    }
  }
  for (size_t i = 0; i < count; ++i) {
    BlockProbe& probe = probes[i];
    const Block& block = *probe.block;
    if (block.words[static_cast<size_t>(probe.at)] < probe.word) ++probe.at;
    if (probe.at == block.size()) continue;
    const std::string_view there = block.key(probe.at);
    if (there == probe.key) {
      probe.found = probe.at;
    } else if (there < probe.key) {  // It has the same word; so may the one looked for, further on.
      probe.found = block.Find(probe.key);
    }
  }
}

// The block of a file that may have a key.
struct BlockKey {
  size_t number;
  uint32_t row;  // Of the key among those that are looked up.
};

// Sets `asked` to keys from `at` on that `table` may have. Returns where those begin that lie behind it.
inline size_t FindBlocks(const TableFile& table, const KeyColumn& keys, const std::vector<uint64_t>& hashes,
                         const std::vector<uint32_t>& open, size_t at, std::vector<BlockKey>* asked) {
  const auto from = open.begin() + static_cast<ptrdiff_t>(at);
  const auto first = std::partition_point(
      from, open.end(), [&](uint32_t row) { return ViewOf(keys, row) < table.first_key(); });
  const auto end = std::partition_point(
      first, open.end(), [&](uint32_t row) { return ViewOf(keys, row) <= table.last_key(); });
  for (auto each = first; each < end; ++each) table.bloom().Prefetch(hashes[*each]);
  asked->clear();
  for (auto each = first; each < end; ++each) {
    BlockKey key{0, *each};
    if (!table.MayContain(hashes[*each]) || !table.FindRange(ViewOf(keys, *each), &key.number)) continue;
    table.Prefetch(key.number);
    asked->push_back(key);
  }
  return static_cast<size_t>(end - open.begin());
}

// `open` are keys in order. `done` becomes true for those that the level has, be it as tombstones.
inline arrow::Status FindInLevel(const Level& level, const KeyColumn& keys, const std::vector<uint64_t>& hashes,
                                 const std::vector<uint32_t>& open, const std::vector<int>& columns, Lookup* lookup,
                                 Held* held, std::vector<bool>* done) {
  BlockProbe probes[kSearchLanes];
  size_t count = 0;
  const auto search = [&] {
    FindInBlocks(probes, count);
    for (size_t i = 0; i < count; ++i) {
      if (probes[i].found < 0) continue;
      (*done)[probes[i].row] = true;
      if (probes[i].block->is_deleted(probes[i].found)) continue;
      lookup->Put(probes[i].row, &probes[i].block->source, static_cast<uint32_t>(probes[i].found));
    }
    count = 0;
  };
  std::vector<BlockKey> asked;
  PartsLookup parts(columns, lookup, done);
  for (size_t at = 0, file = 0; at < open.size();) {
    file = level.FindFile(ViewOf(keys, open[at]), file);
    if (file == level.files.size()) break;
    const TableFile& table = *level.files[file];
    at = FindBlocks(table, keys, hashes, open, at, &asked);
    parts.Expect(asked.size());
    for (size_t first = 0, end = 0; first < asked.size(); first = end) {
      const size_t number = asked[first].number;
      while (end < asked.size() && asked[end].number == number) ++end;
      std::shared_ptr<const Block> block = table.Cached(number);
      if (block == nullptr && table.HasParts(number) && (end - first) * kRowsOfKey <= table.parts()[number].rows &&
          FileParts::Visit(table.parts()[number])) {
        for (size_t i = first; i < end; ++i) {
          ARROW_RETURN_NOT_OK(parts.Add(table, number, ViewOf(keys, asked[i].row), asked[i].row));
        }
        continue;
      }
      if (block == nullptr) {
        ARROW_ASSIGN_OR_RAISE(block, table.Load(number));
      }
      for (size_t i = first; i < end; ++i) {
        // All keys of the block, and this one between them, begin with the same bytes.
        const uint32_t row = asked[i].row;
        probes[count++] = {block.get(), ViewOf(keys, row), keys.Word(row, block->skip), row};
        if (count == kSearchLanes) search();
      }
      held->push_back(std::move(block));
    }
  }
  search();
  return parts.Finish(held);
}

}  // namespace marble
