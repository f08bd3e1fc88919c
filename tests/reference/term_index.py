"""The slow and obvious twin of `marble._core.term_index`: plain lists, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence


class TermIndex:
    """A log as two Python lists. ``terms[k]`` and ``sizes[k]`` belong to index ``first_index + k``."""

    def __init__(self, first_index: int = 1, previous_term: int = 0) -> None:
        self.first_index = first_index
        self.previous_term = previous_term
        self.terms: list[int] = []
        self.sizes: list[int] = []

    @property
    def last_index(self) -> int:
        return self.first_index + len(self.terms) - 1

    @property
    def last_term(self) -> int:
        return self.terms[-1] if self.terms else self.previous_term

    def term_at(self, index: int) -> int:
        if index == self.first_index - 1:
            return self.previous_term
        if not self.first_index <= index <= self.last_index:
            raise IndexError(index)
        return self.terms[index - self.first_index]

    def append(self, terms: Sequence[int], sizes: Sequence[int]) -> None:
        self.terms.extend(terms)
        self.sizes.extend(sizes)

    def first_conflict(self, first: int, terms: Sequence[int]) -> int:
        for index, term in enumerate(terms, first):
            if index < self.first_index:
                continue
            if index > self.last_index or self.term_at(index) != term:
                return index
        return first + len(terms)

    def truncate(self, first: int) -> None:
        del self.terms[first - self.first_index :]
        del self.sizes[first - self.first_index :]

    def purge(self, end: int) -> None:
        self.previous_term = self.term_at(end - 1)
        del self.terms[: end - self.first_index]
        del self.sizes[: end - self.first_index]
        self.first_index = end

    def clip(self, first: int, end: int, bytes_max: int) -> int:
        total = 0
        for index in range(first, end):
            total += self.sizes[index - self.first_index]
            if total > bytes_max and index > first:
                return index
        return end

    def bytes(self, first: int, end: int) -> int:
        return sum(self.sizes[first - self.first_index : end - self.first_index])

    def last_index_at_most_term(self, index: int, term: int) -> int:
        index = min(index, self.last_index)
        while index >= self.first_index - 1:
            if self.term_at(index) <= term:
                return index
            index -= 1
        return max(index, 0)
