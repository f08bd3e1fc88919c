"""The log of a group as the core sees it: terms, sizes and positions. Payloads are the driver's.

Rule 1: positions of the log are written in this file only.

How far entries are on their way to the disk::

    first_index .. persisted_index .. announced_index .. last_index
                   |                  |                  appended here, not yet in any Ready
                   |                  handed out in a Ready, its sync not yet reported
                   durable here

A truncation at ``t`` pulls the two marks below ``t`` and clips every write under way to end before ``t``. So when the
disk reports an old write late, it counts only for entries that were not replaced since, even if a third write put equal
entries back (the ABA race of etcd's asynchronous storage writes).

Rule 2: whoever has an entry that changes the membership in its log knows that all earlier ones in that log are committed,
for a leader appends one only when it has applied all before it. So ``commit_index`` is never below the last but one of
``changes``, not even after a restart that forgot how far it was: a node must not campaign under a membership that two
others have followed since.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence

from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import CorruptionError, InvariantError, check
from marble.raft.messages import Span
from marble.types import SnapshotMeta


class RaftLog:
    """Positions of one log.

    - ``applied_index <= applying_index <= min(commit_index, persisted_index)`` and ``commit_index <= last_index``.
    - ``persisted_index <= announced_index <= last_index``.
    - ``commit_index`` never falls, and entries up to it are never truncated.
    - While a snapshot is being installed, everything of it but ``persisted_index`` is ahead: the log starts after it.
    - ``changes`` ascends, has the indexes of all entries from ``first_index`` on that change the membership.
    """

    __slots__ = (
        "_entries",
        "_writes",
        "announced_index",
        "applied_index",
        "applying_index",
        "changes",
        "commit_index",
        "installing",
        "persisted_index",
    )

    def __init__(self, entries: TermIndex, commit_index: int, applied_index: int, changes: Sequence[int] = ()) -> None:
        if not entries.first_index - 1 <= applied_index <= entries.last_index:
            raise CorruptionError(
                f"applied index {applied_index} does not lie in the log [{entries.first_index}, {entries.last_index}]: "
                "part of the log is gone; restore this node from its peers"
            )
        if commit_index > entries.last_index:
            # A commit index is stored only when the entries are durable (`State.hard_state`).
            raise CorruptionError(
                f"commit index {commit_index} was stored, but the log ends at {entries.last_index}: "
                "committed entries are gone; restore this node from its peers"
            )
        self._entries = entries
        self.changes = [index for index in changes if index >= entries.first_index]
        self.commit_index = max(commit_index, applied_index, *self.changes[-2:-1])
        # A snapshot that no Ready has carried yet.
        self.installing: SnapshotMeta | None = None
        self.applied_index = applied_index
        self.applying_index = applied_index
        self.persisted_index = entries.last_index
        self.announced_index = entries.last_index
        # Writes under way, oldest first: (number of the Ready, index after the last of its entries that still counts).
        self._writes: deque[tuple[int, int]] = deque()

    @property
    def first_index(self) -> int:
        """Index of the first entry that the log still has, or would have."""
        return self._entries.first_index

    @property
    def last_index(self) -> int:
        """Index of the last entry; ``first_index - 1`` if there is none."""
        return self._entries.last_index

    @property
    def last_term(self) -> int:
        """Term of the last entry; 0 if there never was one."""
        return self._entries.last_term

    def term_at(self, index: int) -> int:
        """Term of entry `index`. Raises IndexError outside ``[first_index - 1, last_index]``."""
        return self._entries.term_at(index)

    def term_or_zero(self, index: int) -> int:
        """Term of entry `index`, or 0 where it is not known."""
        if not self._entries.first_index - 1 <= index <= self._entries.last_index:
            return 0
        return self._entries.term_at(index)

    def matches(self, index: int, term: int) -> bool:
        """Whether this log has entry `index` with `term` (the consistency check of Raft §5.3)."""
        if not self._entries.first_index - 1 <= index <= self._entries.last_index:
            return False
        return self._entries.term_at(index) == term

    def is_up_to_date(self, last_index: int, last_term: int) -> bool:
        """Whether a log that ends so is at least as up to date as this one (Raft §5.4.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def last_index_at_most_term(self, index: int, term: int) -> int:
        """Where, at `index` or before, another log whose entry `index` has `term` can at best agree with this one."""
        if index < self._entries.first_index - 1:
            return index
        return self._entries.last_index_at_most_term(index, term)

    def span(self, first: int, end: int) -> EntrySpan:
        """Entries ``[first, end)``."""
        return self._entries.span(first, end)

    def clip(self, first: int, bytes_max: int) -> int:
        """The end of the longest run of entries from `first` within `bytes_max` bytes; at least one if there is any."""
        return self._entries.clip(first, self._entries.last_index + 1, bytes_max)

    def bytes(self, first: int, end: int) -> int:
        """Size of entries ``[first, end)``."""
        return self._entries.bytes(first, end)

    def terms(self) -> list[int]:
        """Terms of all entries from ``first_index`` on. For people and tests."""
        return self._entries.span(self.first_index, self.last_index + 1).terms()

    def append(self, span: EntrySpan, changes: Iterable[int] = ()) -> None:
        """A leader's own entries, at the end; those at `changes` change the membership."""
        self._entries.append(span)
        self.changes.extend(changes)

    def splice(self, span: EntrySpan, changes: Sequence[int] = ()) -> None:
        """A follower's entries from its leader: what is there and equal stays, the first conflict and all after it is
        replaced.

        The caller has checked that the entry before `span` matches (Raft §5.3). A span that ends early truncates
        nothing.
        """
        conflict = self._entries.first_conflict(span)
        if conflict == span.end:
            return
        check(
            conflict > self.commit_index,
            f"the leader's entry {conflict} differs from the one committed here (commit index {self.commit_index}): "
            "two histories were committed",
        )
        if conflict <= self.last_index:
            self._entries.truncate(conflict)
            self.persisted_index = min(self.persisted_index, conflict - 1)
            self.announced_index = min(self.announced_index, conflict - 1)
            self._writes = deque((number, min(end, conflict)) for number, end in self._writes)
            del self.changes[bisect_left(self.changes, conflict) :]
        self._entries.append(span.slice(conflict, span.end))
        self.changes.extend(changes[bisect_left(changes, conflict) :])
        if len(self.changes) > 1:
            self.commit_to(self.changes[-2])

    def restore(self, meta: SnapshotMeta) -> None:
        """Let the log start anew after a snapshot that it does not lead up to; a Ready will carry it to the disk."""
        check(meta.index > self.commit_index, f"a snapshot at {meta.index} below commit index {self.commit_index}")
        # What is on the disk of the old log still counts as far as it is committed; nothing else there is of use.
        self.persisted_index = min(self.persisted_index, self.commit_index)
        self._entries = TermIndex(meta.index + 1, meta.term)
        self._writes.clear()
        self.changes.clear()
        self.commit_index = self.applying_index = self.announced_index = meta.index
        self.installing = meta

    def purge(self, index: int) -> None:
        """Forget entries up to `index`, which a snapshot covers; the term of `index` stays known."""
        check(index <= self.applied_index, f"entry {index} purged, but only {self.applied_index} is applied")
        if index >= self.first_index:
            self._entries.purge(index + 1)
            del self.changes[: bisect_right(self.changes, index)]

    def changes_within(self, first: int, end: int) -> tuple[int, ...]:
        """Those of ``changes`` in ``[first, end)``."""
        if not self.changes or self.changes[-1] < first:
            return ()
        return tuple(self.changes[bisect_left(self.changes, first) : bisect_left(self.changes, end)])

    @property
    def restoring(self) -> bool:
        """Whether a snapshot is being installed, or its state being restored."""
        return self.applied_index + 1 < self.first_index

    @property
    def has_change_to_apply(self) -> bool:
        """Whether the membership in use may be older, or the state is, than what is known to be committed."""
        if self.restoring:
            return True
        at = bisect_right(self.changes, self.applied_index)
        return at < len(self.changes) and self.changes[at] <= self.commit_index

    def commit_to(self, index: int) -> bool:
        """Raise the commit index to `index`. False if it is there already."""
        if index <= self.commit_index:
            return False
        if index > self.last_index:
            raise InvariantError(
                f"entry {index} is committed, but this log, which had acknowledged it, ends at {self.last_index}"
            )
        self.commit_index = index
        return True

    @property
    def has_unannounced(self) -> bool:
        """Whether entries, or a snapshot, wait to be handed out for persisting."""
        return self.announced_index < self.last_index or self.installing is not None

    @property
    def has_committed(self) -> bool:
        """Whether entries wait to be handed out for applying."""
        return self.applying_index < min(self.commit_index, self.persisted_index)

    def announce(self, number: int) -> Span | None:
        """Hand out the entries that no Ready has carried yet; the write, of them and of a snapshot, gets `number`."""
        if not self.has_unannounced:
            return None
        self.installing = None
        self._writes.append((number, self.last_index + 1))
        if self.announced_index == self.last_index:
            return None
        span = Span(self.announced_index + 1, self.last_index + 1)
        self.announced_index = self.last_index
        return span

    def persisted(self, number: int) -> None:
        """All writes up to `number` are durable."""
        while self._writes and self._writes[0][0] <= number:
            self.persisted_index = max(self.persisted_index, self._writes.popleft()[1] - 1)

    def take_committed(self) -> Span | None:
        """Hand out what is committed and durable here and was not handed out before."""
        if not self.has_committed:
            return None
        span = Span(self.applying_index + 1, min(self.commit_index, self.persisted_index) + 1)
        self.applying_index = span.end - 1
        return span

    def applied(self, index: int) -> None:
        """Everything up to `index` is applied. An index that was reported before is no news."""
        check(index <= self.applying_index, f"entry {index} applied, but only {self.applying_index} was handed out")
        self.applied_index = max(self.applied_index, index)
