"""Writing a stream: many batches in flight, in order, within bounds."""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import Future
from types import TracebackType
from typing import Final

from marble.errors import OutcomeUnknownError, UsageError

WRITES_IN_FLIGHT_MAX: Final = 64
"""Batches of one stream that wait for their acknowledgement. More would not fill a sync any better."""

WRITES_IN_FLIGHT_BYTES_MAX: Final = 32 << 20
"""Bytes of them (one batch may always fly), so that a stream of large batches does not pile up in memory."""

ANSWER_TIMEOUT_S: Final = 120.0
"""Backends answer long before; this holds when an engine hangs, as on a disk that no longer answers."""


def outcome(future: Future[int]) -> int:
    """Wait for a write. Raises its error, or OutcomeUnknownError if there is none in time."""
    try:
        return future.result(ANSWER_TIMEOUT_S)
    except TimeoutError:
        raise OutcomeUnknownError(
            f"the write was not decided within {ANSWER_TIMEOUT_S:g} s (a disk that hangs?): it may still take effect"
        ) from None


class WriteWindow:
    """The writes of one stream that are in flight, oldest first.

    Leaving it on an error waits for what still flies, so that no earlier call of the stream is at work after the error.
    """

    def __init__(self, table: str) -> None:
        self._table = table
        self._flying: deque[tuple[Future[int], int]] = deque()
        self._bytes = 0
        self._taken = 0
        self._failed: int | None = None
        self._index: int | None = None

    def __enter__(self) -> WriteWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            number = self._failed or self._taken + 1
            error.add_note(f"at batch {number} of the stream into table {self._table!r}")
            # Their own errors add nothing to the first, which is the one that is raised.
            for future, _ in self._flying:
                with contextlib.suppress(Exception):
                    outcome(future)

    def add(self, future: Future[int], size: int) -> None:
        self._flying.append((future, size))
        self._bytes += size
        self._taken += 1

    def make_room(self, size: int) -> None:
        while self._flying and (
            len(self._flying) >= WRITES_IN_FLIGHT_MAX or self._bytes + size > WRITES_IN_FLIGHT_BYTES_MAX
        ):
            self.wait_one()

    def wait_one(self) -> bool:
        """Wait for the oldest write and raise its error; False if none flies."""
        if not self._flying:
            return False
        future, size = self._flying.popleft()
        self._bytes -= size
        try:
            self._index = outcome(future)
        except Exception:
            self._failed = self._taken - len(self._flying)
            raise
        return True

    def finish(self) -> int:
        while self.wait_one():
            pass
        if self._index is None:
            raise UsageError(f"table {self._table!r}: there are no rows to write: give at least one")
        return self._index
