"""The slow and obvious twin of `marble.raft.log`, with the disk that the log only hears of.

Every entry that is ever appended is an object of its own, so that "this entry is on the disk" means this one and no
other of the same index and term. The disk is a dict, and a write changes it when it is reported, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from marble.types import SnapshotMeta


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry, equal only to itself."""

    term: int
    size: int = 0
    is_change: bool = False


@dataclass
class Write:
    """What one Ready gave to the disk: a snapshot to start after, and entries that replace everything from ``first``."""

    number: int
    snapshot: SnapshotMeta | None
    first: int
    entries: list[Entry]


class RaftLog:
    """A log as a dict from index to entry, and the disk likewise.

    - ``previous_term`` is the term of the entry before ``first_index``.
    - ``disk`` is what a crash would leave, beyond ``disk_start``, up to which a snapshot holds everything.
    """

    def __init__(self, first_index: int, previous_term: int, entries: Sequence[Entry], commit: int) -> None:
        self.first_index = first_index
        self.previous_term = previous_term
        self.entries = dict(enumerate(entries, first_index))
        self.applied_index = self.applying_index = first_index - 1
        self.commit_index = max([commit, self.applied_index, *self.changes[-2:-1]])
        self.disk = dict(self.entries)
        self.disk_start = first_index - 1
        self.writes: list[Write] = []
        self.announced = list(self.entries.values())
        self.installing: SnapshotMeta | None = None
        # How much of the old log counts while a snapshot is on its way to the disk.
        self.kept = 0

    @property
    def last_index(self) -> int:
        return max(self.entries, default=self.first_index - 1)

    @property
    def last_term(self) -> int:
        return self.term_at(self.last_index)

    @property
    def changes(self) -> list[int]:
        return [index for index, entry in sorted(self.entries.items()) if entry.is_change]

    def term_at(self, index: int) -> int:
        return self.previous_term if index == self.first_index - 1 else self.entries[index].term

    @property
    def announced_index(self) -> int:
        """Up to where every entry was given to the disk."""
        index = self.first_index - 1
        while self.entries.get(index + 1) in self.announced:
            index += 1
        return index

    @property
    def persisted_index(self) -> int:
        """Up to where the disk holds this log's entries themselves."""
        if self.installing or any(write.snapshot for write in self.writes):
            return self.kept
        index = self.disk_start
        while index + 1 in self.entries and self.disk.get(index + 1) is self.entries[index + 1]:
            index += 1
        return index

    @property
    def has_change_to_apply(self) -> bool:
        missing = self.applied_index + 1 < self.first_index
        return missing or any(self.applied_index < index <= self.commit_index for index in self.changes)

    def append(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.entries[self.last_index + 1] = entry

    def splice(self, first: int, entries: Sequence[Entry]) -> None:
        for index, entry in enumerate(entries, first):
            if index in self.entries and self.entries[index].term != entry.term:
                self.entries = {place: old for place, old in self.entries.items() if place < index}
            self.entries.setdefault(index, entry)
        for change in self.changes[:-1]:
            self.commit_index = max(self.commit_index, change)

    def announce(self, number: int) -> tuple[int, int] | None:
        """[first, end) of what this write takes along, if any."""
        first, end = self.announced_index + 1, self.last_index + 1
        if first == end and self.installing is None:
            return None
        taken = [self.entries[index] for index in range(first, end)]
        self.writes.append(Write(number, self.installing, first, taken))
        self.installing = None
        self.announced += taken
        return (first, end) if taken else None

    def persisted(self, number: int) -> None:
        while self.writes and self.writes[0].number <= number:
            write = self.writes.pop(0)
            if write.snapshot is not None:
                self.disk_start = write.snapshot.index
                self.disk = {}
            self.disk = {index: entry for index, entry in self.disk.items() if index < write.first}
            self.disk |= dict(enumerate(write.entries, write.first))

    def restore(self, meta: SnapshotMeta) -> None:
        self.kept = min(self.persisted_index, self.commit_index)
        self.entries = {}
        self.first_index, self.previous_term = meta.index + 1, meta.term
        self.commit_index = self.applying_index = meta.index
        self.installing = meta

    def purge(self, index: int) -> None:
        if index >= self.first_index:
            self.previous_term = self.entries[index].term
            self.entries = {place: entry for place, entry in self.entries.items() if place > index}
            self.first_index = index + 1
            self.disk_start = max(self.disk_start, index)

    def take_committed(self) -> tuple[int, int] | None:
        first, end = self.applying_index + 1, min(self.commit_index, self.persisted_index) + 1
        if first >= end:
            return None
        self.applying_index = end - 1
        return first, end
