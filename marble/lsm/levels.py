"""Which files a table consists of, and in which order they count: an immutable value, replaced as a whole.

Invariants:
- level 0 has the newest file first; its files may have keys in common, and every version in one of them is newer than
  those of the same key in the files behind it;
- the files of every deeper level ascend by key and have no key in common;
- of one key, what stands in a level is newer than what stands in any deeper one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from marble.errors import check
from marble.lsm.files import TableFile


@dataclass(frozen=True, slots=True)
class Levels:
    """The files of a table by level. See the head of this file for the invariants."""

    levels: tuple[tuple[TableFile, ...], ...] = ((),)

    @staticmethod
    def of(levels: Sequence[Sequence[TableFile]]) -> Levels:
        """These levels, without empty ones at the end. Raises InvariantError if a deep level is not in order."""
        kept = [tuple(files) for files in levels] or [()]
        while len(kept) > 1 and not kept[-1]:
            kept.pop()
        for files in kept[1:]:
            for before, after in pairwise(files):
                check(before.last_key < after.first_key, f"files {before.name} and {after.name} of one level overlap")
        return Levels(tuple(kept))

    def __iter__(self) -> Iterator[TableFile]:
        """All files, newest data first."""
        return (file for files in self.levels for file in files)

    def __bool__(self) -> bool:
        """Whether there is any file."""
        return any(self.levels)

    def __getitem__(self, level: int) -> tuple[TableFile, ...]:
        """The files of one level, none if it is deeper than all."""
        return self.levels[level] if level < len(self.levels) else ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self)

    def flushed(self, files: Sequence[TableFile]) -> Levels:
        """With `files`, all newer than everything here, before the others of level 0."""
        return Levels((tuple(files) + self.levels[0], *self.levels[1:]))

    def replaced(self, gone: Collection[str], level: int, files: Sequence[TableFile]) -> Levels:
        """Without the files named in `gone`, and with `files` in `level`.

        In level 0 they take the place of the first that goes, in deeper ones the place that their keys give them. They hold
        the newest versions of what goes, so that neither content nor order changes.
        """
        kept = [[file for file in each if file.name not in gone] for each in self.levels]
        kept += [[] for _ in range(level + 1 - len(kept))]
        if level == 0:
            first = next((i for i, file in enumerate(self.levels[0]) if file.name in gone), 0)
            kept[0][first:first] = files
        else:
            kept[level] = sorted([*kept[level], *files], key=lambda file: file.first_key)
        return Levels.of(kept)

    def without(self, names: Collection[str]) -> Levels:
        """Without the files of these names."""
        return Levels.of([[file for file in each if file.name not in names] for each in self.levels])

    def overlapping(self, level: int, first_key: bytes, last_key: bytes) -> tuple[TableFile, ...]:
        """Files of `level` with keys in this range, both ends included."""
        files = self[level]
        if level == 0:
            return tuple(file for file in files if file.meets(first_key, last_key))
        start = bisect_left(files, first_key, key=lambda file: file.last_key)
        return files[start : bisect_right(files, last_key, start, key=lambda file: file.first_key)]

    def reaches_below(self, level: int, first_key: bytes, last_key: bytes) -> bool:
        """Whether a level deeper than `level` has keys in this range: then a tombstone above it still hides something."""
        return any(self.overlapping(deeper, first_key, last_key) for deeper in range(level + 1, len(self.levels)))
