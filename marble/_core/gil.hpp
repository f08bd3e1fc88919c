// Giving the interpreter's lock back, where that is worth it.
//
// Who gives the lock back while another thread waits for it gets it again only when that thread blocks: two changes of
// threads, tens of microseconds, and of a node's small write there are twenty such places. A loop over a few kilobytes
// has long ended by then. So short work keeps the lock, and work on much data gives it back.

#pragma once

#include <Python.h>

#include <cstdint>

namespace marble {

/// What is walked or copied faster than threads change: some 2 us at 16 GB/s.
inline constexpr int64_t kShortBytes = 32 * 1024;

/// Give the lock back if `nbytes` are much. What follows must not touch the interpreter, nor throw, until `TakeGil`.
inline PyThreadState* ReleaseGil(int64_t nbytes) { return nbytes < kShortBytes ? nullptr : PyEval_SaveThread(); }

/// The lock is held again behind this; `released` is what `ReleaseGil` returned.
inline void TakeGil(PyThreadState* released) {
  if (released != nullptr) PyEval_RestoreThread(released);
}

}  // namespace marble
