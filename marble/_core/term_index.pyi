"""Terms and sizes of log entries. Layout, ownership and invariants: head of ``term_index.pyx``."""

from collections.abc import Sequence
from typing import final

from typing_extensions import Buffer

@final
class EntrySpan:
    """A run of log entries ``[first, end)`` without payloads: terms and sizes in bytes. Immutable; may be empty."""

    @staticmethod
    def of(first: int, terms: Sequence[int], sizes: Sequence[int] | None = None) -> EntrySpan:
        """Make a span from Python integers.

        Parameters
        ----------
        first
            Index of the first entry, at least 1.
        terms
            One term per entry, each at least 1, never falling.
        sizes
            One size in bytes per entry; all 0 if None.

        Raises
        ------
        ProtocolError
            An index, term or size is out of range, terms fall, or the lengths differ.
        """

    @staticmethod
    def from_buffers(first: int, terms: Buffer, sizes: Buffer) -> EntrySpan:
        """Make a span from contiguous buffers of native uint64, which are copied. Raises ProtocolError as `of` does."""

    @property
    def first(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def first_term(self) -> int:
        """Raises IndexError if empty."""

    @property
    def last_term(self) -> int:
        """Raises IndexError if empty."""

    @property
    def bytes(self) -> int:
        """Sum of all sizes."""

    def term_at(self, index: int) -> int:
        """Term of entry `index`. Raises IndexError outside ``[first, end)``."""

    def size_at(self, index: int) -> int:
        """Size of entry `index` in bytes. Raises IndexError outside ``[first, end)``."""

    def slice(self, first: int, end: int) -> EntrySpan:
        """Entries ``[first, end)``. Raises IndexError unless ``self.first <= first <= end <= self.end``."""

    def terms(self) -> list[int]: ...
    def sizes(self) -> list[int]: ...
    def __len__(self) -> int: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class TermIndex:
    """Terms and sizes of the log ``[first_index, last_index]``, and the term of the entry before it. For one thread.

    Parameters
    ----------
    first_index
        Index that the first entry to be appended will have, at least 1.
    previous_term
        Term of entry ``first_index - 1``; 0 if there is none.
    """

    def __init__(self, first_index: int = 1, previous_term: int = 0) -> None: ...
    @property
    def first_index(self) -> int: ...
    @property
    def last_index(self) -> int:
        """``first_index - 1`` when the log is empty."""

    @property
    def last_term(self) -> int: ...
    def __len__(self) -> int: ...
    def term_at(self, index: int) -> int:
        """Term of entry `index`. Raises IndexError outside ``[first_index - 1, last_index]``."""

    def append(self, span: EntrySpan) -> None:
        """Add `span` at the end.

        Raises IndexError unless it starts at ``last_index + 1``, ProtocolError if terms would fall.
        """

    def first_conflict(self, span: EntrySpan) -> int:
        """The first index of `span` whose entry this log lacks or has with another term; ``span.end`` if there is none.

        Entries below ``first_index`` count as equal. Raises IndexError if `span` starts beyond ``last_index + 1``.
        """

    def truncate(self, first: int) -> None:
        """Drop entries from `first` on. Raises IndexError outside ``[first_index, last_index + 1]``."""

    def purge(self, end: int) -> None:
        """Drop entries before `end`, but keep the term of ``end - 1``.

        Raises IndexError outside ``[first_index, last_index + 1]``.
        """

    def clip(self, first: int, end: int, bytes_max: int) -> int:
        """The largest ``e <= end`` such that ``[first, e)`` has at most `bytes_max` bytes, or else exactly one entry.

        An empty range stays empty.
        """

    def bytes(self, first: int, end: int) -> int:
        """Total size of entries ``[first, end)``."""

    def last_index_at_most_term(self, index: int, term: int) -> int:
        """The largest ``i <= index`` whose term is at most `term` (etcd's ``findConflictByTerm``).

        An `index` beyond the log counts as ``last_index``. When even entry ``first_index - 1`` has a greater term, the
        answer is ``max(first_index - 2, 0)``, of which this index knows no term. Raises IndexError if `index` is below
        ``first_index - 1``.
        """

    def span(self, first: int, end: int) -> EntrySpan:
        """Entries ``[first, end)`` as a span. Raises IndexError outside the log."""
