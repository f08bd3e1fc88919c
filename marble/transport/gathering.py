"""Small writes that wait become one batch: what a stream of writes holds while they are on their way.

Rule 1: writes are gathered only before they were ever sent, and in their order. A batch that has a number keeps its writes for good.
Rule 2: what is gathered must fail only for reasons that hold for each of its writes: it must not be too large for an entry, and
whoever gathers sees to it that no row of it can be refused for its own sake.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from marble.errors import MarbleError, OutcomeUnknownError
from marble.transport.wire import Ack, Stamp

GATHER_BATCH_BYTES_MAX: Final = 64 * 1024
"""Larger batches are worth a message of their own."""

GATHERED_BYTES_MAX: Final = 1024 * 1024
"""What is gathered into one batch, at most."""


@dataclass(slots=True, eq=False)
class Item:
    """One batch on its way: of one write, or of several that were gathered, which share its fate.

    - ``futures`` are those of the writes, in their order. A batch with a stamp keeps them for good.
    - ``refusal``: the server said that the last attempt was not replicated; None while that is not known.
    - ``open``: some attempt under ``stamp`` may have taken effect, or may do so still.
    """

    batch: pa.RecordBatch
    size: int
    futures: tuple[Future[Ack], ...]
    deadline: float
    stamp: Stamp | None = None
    refusal: MarbleError | None = None
    open: bool = False

    def give_up(self, why: MarbleError) -> None:
        """End it with what is known: `why` if nothing was replicated."""
        if self.open:
            why = OutcomeUnknownError(f"the write was sent and its answer was lost ({why})")
        self.fail(why)

    def fail(self, error: MarbleError) -> None:
        """It ends with `error`."""
        for future in self.futures:
            future.set_exception(error)

    @property
    def fresh(self) -> bool:
        """Whether it may become part of another: it was never sent."""
        return self.stamp is None and self.refusal is None and self.size <= GATHER_BATCH_BYTES_MAX


def gather(waiting: deque[Item], bytes_max: int) -> Item:
    """Take the first of `waiting`, and with it those after it that may share its fate, as one batch.

    Parameters
    ----------
    waiting
        At least one. What was taken is no longer in it.
    bytes_max
        How large an IPC message the batch may become; 0: nothing is gathered.
    """
    first = waiting.popleft()
    limit = min(bytes_max, GATHERED_BYTES_MAX)
    taken, size = [first], first.size
    while first.fresh and waiting and waiting[0].fresh and size + waiting[0].size <= limit:
        taken.append(waiting.popleft())
        size += taken[-1].size
    if len(taken) == 1:
        return first
    batch = pa.concat_batches([item.batch for item in taken])
    if pa.ipc.get_record_batch_size(batch) > limit:
        # Many columns of few rows: each alone may be an entry, all together perhaps not.
        waiting.extendleft(reversed(taken[1:]))
        return first
    futures = tuple(future for item in taken for future in item.futures)
    return Item(batch, size, futures, min(item.deadline for item in taken))
