"""Pieces of files that are asked for before they are needed, so that a long way costs one round trip and not one for each.

Whoever fetches needs bytes in order: of one file after the other, each from some offset on. What is asked for, and what has
arrived before its turn, is a window over that order.

Rule 1: what is needed next is always asked for; what is more than that is a guess, and may be lost without harm.
Rule 2: the window grows with each piece that comes about as quickly as the quickest did, and shrinks with each that comes much
later: then the way is full, and more questions would only make a longer queue at its entrance, for everybody who uses it.

Invariants:
- ``1 <= size <= pieces_max``, and no question is asked while `size` pieces are under way or held.
- A piece that nobody asked for is not kept, unless it is the one that is needed next: memory is bounded by the window.
- All time is in ticks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import pyarrow as pa

PIECES_MAX: Final = 64
"""Under way or held at once, however small they are: a turn looks at each."""

SLOWER_TICKS: Final = 3
"""What a piece may take longer than the quickest before the way counts as full."""


class Window:
    """One receiver's. One thread.

    Parameters
    ----------
    bytes_max
        Pieces under way and held, together.
    piece_bytes
        What one piece has, until the first one tells: its sender decides.
    """

    def __init__(self, bytes_max: int, piece_bytes: int) -> None:
        self.size = 1
        self._bytes_max = bytes_max
        self._piece_bytes = piece_bytes
        self._now = 0
        self._quickest: int | None = None
        self._asked: dict[tuple[int, int], tuple[int, int]] = {}
        """File and offset -> when it was asked for, and how many bytes are expected."""
        self._held: dict[tuple[int, int], pa.Buffer] = {}

    @property
    def pieces_max(self) -> int:
        return max(1, min(PIECES_MAX, self._bytes_max // self._piece_bytes))

    def tick(self) -> None:
        """A tick has passed."""
        self._now += 1

    def reset(self) -> None:
        """Nothing is expected any more, and what is held is not trusted."""
        self.size = 1
        self._asked.clear()
        self._held.clear()

    def lost(self) -> None:
        """What is under way does not come: ask anew, for little. What is held stays."""
        self.size = 1
        self._asked.clear()

    def refused(self, file: int, offset: int) -> None:
        """The answer came, and brought nothing."""
        self._asked.pop((file, offset), None)

    def keep(self, file: int, offset: int, data: pa.Buffer, needed: tuple[int, int]) -> bool:
        """A piece has arrived while the bytes at `needed` (file and offset) come next. Returns whether it was kept."""
        asked = self._asked.pop((file, offset), None)
        if asked is None and not (file == needed[0] and offset <= needed[1] < offset + data.size):
            return False
        self._held[file, offset] = data
        if asked is not None:
            self._learn(self._now - asked[0], data.size, asked[1])
        return True

    def _learn(self, ticks: int, size: int, expected: int) -> None:
        if size != expected and size:
            # Its sender cuts otherwise. What is under way leaves gaps then, which are asked for when their turn comes.
            self._piece_bytes = size
        self._quickest = ticks if self._quickest is None else min(ticks, self._quickest)
        grown = self.size + (1 if ticks <= self._quickest + SLOWER_TICKS else -1)
        self.size = max(1, min(grown, self.pieces_max))

    def take(self, file: int, offset: int) -> list[tuple[int, pa.Buffer]]:
        """What is held of `file` from `offset` on without a gap, as offsets and bytes. It is held no longer."""
        taken = []
        while (found := self._covering(file, offset)) is not None:
            data = self._held.pop(found)
            taken.append((found[1], data))
            offset = found[1] + data.size
        for key in [key for key in self._held if key[0] == file and key[1] < offset]:
            del self._held[key]
        return taken

    def forget(self, file: int) -> None:
        """`file` is whole, or not wanted."""
        for pieces in (self._held, self._asked):
            for key in [key for key in pieces if key[0] == file]:
                del pieces[key]

    def _covering(self, file: int, offset: int) -> tuple[int, int] | None:
        if (file, offset) in self._held:
            return file, offset
        # A file that was partly here begins between the offsets that were asked for before that was known.
        covers = (key for key, data in self._held.items() if key[0] == file and key[1] < offset < key[1] + data.size)
        return next(covers, None)

    def plan(self, wanted: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
        """What to ask for now, as file and offset; each counts as asked when it is given.

        Parameters
        ----------
        wanted
            Files in the order of need: which, from what offset on, and their bytes. The first is needed now.
        """
        for file, offset, nbytes in wanted:
            at = offset
            while at < nbytes:
                there = self._there(file, at)
                if there is None:
                    # The piece that is needed is asked for even if the window is full of what comes after it.
                    needed = (file, at) == wanted[0][:2]
                    if len(self._asked) + len(self._held) >= self.size and not needed:
                        return
                    there = min(self._piece_bytes, nbytes - at)
                    self._asked[file, at] = (self._now, there)
                    yield file, at
                at += there

    def _there(self, file: int, at: int) -> int | None:
        """How many bytes from `at` on are held or under way; None for none."""
        if (held := self._held.get((file, at))) is not None:
            return int(held.size)
        if (asked := self._asked.get((file, at))) is not None:
            return asked[1]
        for (other, start), data in self._held.items():
            if other == file and start < at < start + data.size:
                return int(start + data.size - at)
        for (other, start), (_, expected) in self._asked.items():
            if other == file and start < at < start + expected:
                return start + expected - at
        return None
