// Two runs of a memtable become one.
//
// Ownership and invariants: memtable_run.hpp. A merged run shares the sources of both.
// Thread safety: for the writer's thread; the runs that are merged do not change.
#pragma once

#include "merge_pieces.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace marble {

// Drops slots without refs from the table of slots and renumbers the refs, once they are a quarter of it.
inline void TidySlots(Run* run) {
  size_t dead = 0;
  for (const Slot& slot : run->slots) dead += slot.live == 0 ? 1 : 0;
  if (dead * 4 <= run->slots.size()) return;
  std::vector<uint32_t> renumbered(run->slots.size(), 0);
  std::vector<Slot> kept;
  kept.reserve(run->slots.size() - dead);
  for (size_t i = 0; i < run->slots.size(); ++i) {
    renumbered[i] = static_cast<uint32_t>(kept.size());
    if (run->slots[i].live > 0) kept.push_back(std::move(run->slots[i]));
  }
  for (size_t i = 0; i < run->size; ++i) {
    const uint64_t ref = run->refs[i];
    run->refs[i] = (ref & kTombstone) | MakeRef(renumbered[SlotOf(ref)], RowOf(ref));
  }
  run->slots = std::move(kept);
}

// Lets go of refs: counts them off their slots, and frees the sources that no ref needs any more.
inline void ReleaseRefs(Run* run, const uint64_t* refs, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    if ((refs[i] & kTombstone) != 0) --run->tombstones;
    Slot& slot = run->slots[SlotOf(refs[i])];
    if (--slot.live == 0) slot.source.reset();
  }
}

// Merges two neighbouring runs. In the oldest run of all (`bottom`) tombstones have nothing left to hide and are
// dropped, unless older rows lie outside of the memtable (`keep_tombstones`).
inline std::shared_ptr<Run> MergeRuns(const Run& newer, const Run& older, bool bottom, bool keep_tombstones,
                                      const KeyShape& shape) {
  auto run = std::make_shared<Run>();
  if (newer.slots.size() + older.slots.size() > kSlotMax) throw std::bad_alloc();
  run->slots.reserve(newer.slots.size() + older.slots.size());
  run->slots.insert(run->slots.end(), older.slots.begin(), older.slots.end());
  run->slots.insert(run->slots.end(), newer.slots.begin(), newer.slots.end());
  std::vector<const Source*> sources;
  if (!shape.whole) {
    sources.reserve(run->slots.size());
    for (const Slot& slot : run->slots) sources.push_back(slot.source.get());
  }
  run->words = Words(newer.size + older.size);
  run->refs = Words(newer.size + older.size);
  run->tombstones = newer.tombstones + older.tombstones;
  Words dropped(std::min(newer.size, older.size) + 1);
  const Piece newer_piece{newer.words.get(), newer.refs.get(), newer.size, uint64_t{older.slots.size()} << 32};
  const Piece older_piece{older.words.get(), older.refs.get(), older.size, 0};
  MergeOutput out{run->words.get(), run->refs.get(), dropped.get()};
  MergePieces(shape, newer_piece, older_piece, sources.data(), &out);
  run->size = out.size;
  ReleaseRefs(run.get(), dropped.get(), out.dropped_size);
  if (bottom && !keep_tombstones && run->tombstones > 0) {
    size_t kept = 0;
    for (size_t i = 0; i < run->size; ++i) {
      const uint64_t ref = run->refs[i];
      if ((ref & kTombstone) != 0) {
        ReleaseRefs(run.get(), &ref, 1);
      } else {
        run->words[kept] = run->words[i];
        run->refs[kept++] = ref;
      }
    }
    run->size = kept;
  }
  if (run->size * 4 < (newer.size + older.size) * 3) {
    run->words.Shrink(run->size);
    run->refs.Shrink(run->size);
  }
  TidySlots(run.get());
  const int64_t newer_delta = newer.delta.load(std::memory_order_relaxed);
  const int64_t older_delta = older.delta.load(std::memory_order_relaxed);
  if (bottom) {
    run->delta.store(static_cast<int64_t>(run->size - run->tombstones), std::memory_order_relaxed);
  } else if (newer_delta != Run::kUnknown && older_delta != Run::kUnknown) {
    run->delta.store(newer_delta + older_delta, std::memory_order_relaxed);
  }
  return run;
}

}  // namespace marble
