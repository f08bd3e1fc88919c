# distutils: language = c++
"""Terms and sizes of log entries: what Raft needs to know of a log in order to match, clip and back-track.

Layout:
    EntrySpan   ``first`` and two flat vectors of uint64, one element per entry: term, size in bytes.
    TermIndex   runs of equal terms ``(first index of the run, term)`` in ascending order, and one running sum of sizes per
                entry: ``sums[head + k]`` is the total size of all entries ever appended up to and including entry
                ``first_index + k``. ``head`` elements at the front are purged and are freed once they are the majority.
Ownership: both own all their memory; buffers of callers are copied and not kept.
Thread safety: an EntrySpan never changes and may be shared; a TermIndex belongs to one thread.

Invariants:
1. Terms never fall along a span or an index; every entry's term is at least 1 and fits a signed 64-bit integer.
2. ``first >= 1`` and ``end - 1 <= INDEX_MAX`` (2**63 - 1).
3. Sizes of a span, and of all that was appended to an index, add up to less than 2**64.
4. ``runs`` of a TermIndex starts with the run that holds entry ``first_index - 1`` (term ``previous_term``), so `term_at` also
   answers for that one; no two neighbouring runs have the same term.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from cpython.pystate cimport PyThreadState
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from libcpp.vector cimport vector

from marble._core.gil cimport release_gil, take_gil

from marble.errors import ProtocolError

cdef uint64_t INDEX_MAX = (<uint64_t>1 << 63) - 1
cdef uint64_t SIZE_MAX_TOTAL = ~<uint64_t>0

# Outcomes of check_entries, which runs without the GIL and so cannot raise.
cdef enum Fault:
    FAULT_NONE
    FAULT_TERM_RANGE
    FAULT_TERM_FALLS
    FAULT_SIZES


cdef Fault check_entries(const vector[uint64_t]& terms, const vector[uint64_t]& sizes) noexcept nogil:
    """Which of invariants 1 and 3 the vectors break, if any."""
    cdef size_t k
    cdef uint64_t previous = 1
    cdef uint64_t total = 0
    for k in range(terms.size()):
        if terms[k] == 0 or terms[k] > INDEX_MAX:
            return FAULT_TERM_RANGE
        if terms[k] < previous:
            return FAULT_TERM_FALLS
        previous = terms[k]
        if sizes[k] > SIZE_MAX_TOTAL - total:
            return FAULT_SIZES
        total += sizes[k]
    return FAULT_NONE


cdef uint64_t sum_of(const vector[uint64_t]& values) noexcept nogil:
    cdef uint64_t total = 0
    cdef size_t k
    for k in range(values.size()):
        total += values[k]
    return total


cdef size_t count_up_to(const vector[uint64_t]& values, size_t low, size_t high, uint64_t value) noexcept nogil:
    """The position in ``[low, high]`` after the last element that is at most `value`; elements of ``[low, high)`` never fall."""
    cdef size_t middle
    while low < high:
        middle = low + (high - low) // 2
        if values[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low


@cython.final
@cython.auto_pickle(False)
@cython.final
cdef class EntrySpan:
    """A run of log entries ``[first, end)`` without their payloads: terms and sizes. Immutable; may be empty."""

    cdef uint64_t _first
    cdef vector[uint64_t] _terms
    cdef vector[uint64_t] _sizes

    def __init__(self):
        raise TypeError("make an EntrySpan with EntrySpan.of or EntrySpan.from_buffers")

    @staticmethod
    def of(first, terms, sizes=None):
        cdef EntrySpan span = EntrySpan.__new__(EntrySpan)
        try:
            span._terms = terms
            if sizes is None:
                span._sizes.assign(span._terms.size(), 0)
            else:
                span._sizes = sizes
        except OverflowError as error:
            raise ProtocolError(f"a term or size of an entry does not fit 64 bits: {error}") from None
        span._seal(first)
        return span

    @staticmethod
    def from_buffers(first, terms, sizes):
        cdef EntrySpan span = EntrySpan.__new__(EntrySpan)
        copy_uint64(terms, span._terms)
        copy_uint64(sizes, span._sizes)
        span._seal(first)
        return span

    cdef int _seal(self, first) except -1:
        """Check the invariants and set ``first``: the last act of making a span."""
        cdef Fault fault
        cdef size_t count = self._terms.size()
        if count != self._sizes.size():
            raise ProtocolError(f"{count} terms but {self._sizes.size()} sizes")
        if not 1 <= first <= INDEX_MAX or count > INDEX_MAX - <uint64_t>first + 1:
            raise ProtocolError(f"{count} entries from index {first} do not lie within 1 to {INDEX_MAX}")
        cdef PyThreadState* released = release_gil(<int64_t>count * sizeof(uint64_t))
        fault = check_entries(self._terms, self._sizes)
        take_gil(released)
        if fault == FAULT_TERM_RANGE:
            raise ProtocolError(f"the term of an entry is not within 1 to {INDEX_MAX}")
        if fault == FAULT_TERM_FALLS:
            raise ProtocolError(f"terms fall along the entries from index {first}")
        if fault == FAULT_SIZES:
            raise ProtocolError("the sizes of the entries add up to more than 64 bits")
        self._first = first
        return 0

    @property
    def first(self):
        return self._first

    @property
    def end(self):
        return self._first + self._terms.size()

    @property
    def first_term(self):
        if self._terms.empty():
            raise IndexError("an empty span has no first term")
        return self._terms.front()

    @property
    def last_term(self):
        if self._terms.empty():
            raise IndexError("an empty span has no last term")
        return self._terms.back()

    @property
    def bytes(self):
        cdef PyThreadState* released = release_gil(<int64_t>self._sizes.size() * sizeof(uint64_t))
        cdef uint64_t total = sum_of(self._sizes)
        take_gil(released)
        return total

    cdef size_t _offset(self, index) except? 0:
        if not self._first <= index < self._first + self._terms.size():
            raise IndexError(f"index {index} is not within [{self._first}, {self.end})")
        return <size_t>(<uint64_t>index - self._first)

    def term_at(self, index):
        return self._terms[self._offset(index)]

    def size_at(self, index):
        return self._sizes[self._offset(index)]

    def slice(self, first, end):
        cdef EntrySpan span
        cdef size_t low, high
        if not self._first <= first <= end <= self._first + self._terms.size():
            raise IndexError(f"[{first}, {end}) is not within [{self._first}, {self.end})")
        if first == self._first and end == self.end:
            return self
        span = EntrySpan.__new__(EntrySpan)
        low = <size_t>(<uint64_t>first - self._first)
        high = <size_t>(<uint64_t>end - self._first)
        # A slice of a span keeps all invariants except the one on `first` of an empty slice at the very end of the index space,
        # which no message can name (INDEX_MAX bounds log_index).
        span._first = first
        span._terms.assign(self._terms.begin() + low, self._terms.begin() + high)
        span._sizes.assign(self._sizes.begin() + low, self._sizes.begin() + high)
        return span

    def terms(self):
        return self._terms

    def sizes(self):
        return self._sizes

    def __len__(self):
        return <Py_ssize_t>self._terms.size()

    def __eq__(self, other):
        cdef EntrySpan span
        if not isinstance(other, EntrySpan):
            return NotImplemented
        span = <EntrySpan>other
        return self._first == span._first and self._terms == span._terms and self._sizes == span._sizes

    def __hash__(self):
        return hash((self._first, self._terms.size(), 0 if self._terms.empty() else self._terms.back()))

    def __repr__(self):
        # Runs, not entries: a span of ten thousand entries stays one readable line.
        cdef size_t k, start = 0
        cdef list runs = []
        for k in range(1, self._terms.size() + 1):
            if k == self._terms.size() or self._terms[k] != self._terms[start]:
                runs.append(f"term {self._terms[start]} x {k - start}")
                start = k
        return f"EntrySpan([{self._first}, {self.end}): {', '.join(runs) or 'empty'}; {self.bytes} bytes)"


cdef int copy_uint64(source, vector[uint64_t]& target) except -1:
    """Copy a contiguous buffer of native (little-endian) uint64 into `target`."""
    cdef Py_buffer view
    PyObject_GetBuffer(source, &view, PyBUF_SIMPLE)
    try:
        if view.len % 8:
            raise ProtocolError(f"a buffer of {view.len} bytes does not hold whole uint64 values")
        target.resize(<size_t>view.len // 8)
        if view.len:
            # memcpy, because nothing promises that a buffer off the wire is aligned.
            memcpy(target.data(), view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return 0


cdef uint64_t common_prefix(
    const vector[uint64_t]& terms,
    size_t start,
    uint64_t first,
    uint64_t last_index,
    const vector[uint64_t]& run_firsts,
    const vector[uint64_t]& run_terms,
) noexcept nogil:
    """First index from ``first + start`` on at which `terms` (of entries from `first`) and the runs differ, or the index after the
    last that both have. The caller has checked that index ``first + start`` is not below the first run."""
    cdef size_t k = start
    cdef uint64_t index, stop
    cdef size_t run
    if k >= terms.size() or first + k > last_index:
        return first + k
    run = count_up_to(run_firsts, 0, run_firsts.size(), first + k) - 1
    while k < terms.size() and first + k <= last_index:
        stop = run_firsts[run + 1] if run + 1 < run_firsts.size() else last_index + 1
        while k < terms.size() and first + k < stop:
            if terms[k] != run_terms[run]:
                return first + k
            k += 1
        run += 1
    index = first + k
    return index


@cython.final
@cython.auto_pickle(False)
@cython.final
cdef class TermIndex:
    """Terms and sizes of the log ``[first_index, last_index]``, and the term of the entry before it."""

    cdef uint64_t _first
    cdef vector[uint64_t] _run_firsts
    cdef vector[uint64_t] _run_terms
    cdef vector[uint64_t] _sums
    cdef size_t _head
    # The running sum before entry `_first`.
    cdef uint64_t _base

    def __init__(self, first_index=1, previous_term=0):
        if not 1 <= first_index <= INDEX_MAX or not 0 <= previous_term <= INDEX_MAX:
            raise ValueError(f"a log cannot start at index {first_index} after term {previous_term}")
        self._first = first_index
        self._run_firsts.push_back(self._first - 1)
        self._run_terms.push_back(previous_term)
        self._head = 0
        self._base = 0

    cdef uint64_t _end(self) noexcept nogil:
        return self._first + (self._sums.size() - self._head)

    cdef uint64_t _sum_before(self, uint64_t index) noexcept nogil:
        """Total size of everything before `index`, which the caller has checked to lie in ``[first, end]``."""
        return self._base if index == self._first else self._sums[self._head + (index - self._first) - 1]

    cdef uint64_t _term(self, uint64_t index) noexcept nogil:
        """Term at `index`, which the caller has checked to lie in ``[first - 1, end)``."""
        return self._run_terms[count_up_to(self._run_firsts, 0, self._run_firsts.size(), index) - 1]

    cdef int _check_range(self, first, end) except -1:
        if not self._first <= first <= end <= self._end():
            raise IndexError(f"[{first}, {end}) is not within [{self._first}, {self._end()})")
        return 0

    @property
    def first_index(self):
        return self._first

    @property
    def last_index(self):
        return self._end() - 1

    @property
    def last_term(self):
        return self._run_terms.back()

    def __len__(self):
        return <Py_ssize_t>(self._sums.size() - self._head)

    def term_at(self, index):
        if not self._first - 1 <= index < self._end():
            raise IndexError(f"the term of index {index} is not known: the log is [{self._first}, {self._end()})")
        return self._term(index)

    def append(self, EntrySpan span not None):
        cdef size_t k
        cdef uint64_t total, last_term, end
        if span._first != self._end():
            raise IndexError(f"entries from {span._first} do not follow the log, which ends before {self._end()}")
        if span._terms.empty():
            return
        last_term = self._run_terms.back()
        if span._terms.front() < last_term:
            raise ProtocolError(f"term {span._terms.front()} of index {span._first} is below the log's last term {last_term}")
        end = self._end()
        total = self._sum_before(end)
        if span.bytes > SIZE_MAX_TOTAL - total:
            raise ProtocolError("the sizes of all entries add up to more than 64 bits")
        cdef PyThreadState* released = release_gil(<int64_t>span._terms.size() * sizeof(uint64_t))
        for k in range(span._terms.size()):
            if span._terms[k] != last_term:
                last_term = span._terms[k]
                self._run_firsts.push_back(end + k)
                self._run_terms.push_back(last_term)
            total += span._sizes[k]
            self._sums.push_back(total)
        take_gil(released)

    def first_conflict(self, EntrySpan span not None):
        cdef uint64_t conflict
        cdef size_t start
        if span._first > self._end():
            raise IndexError(f"entries from {span._first} leave a gap after the log, which ends before {self._end()}")
        # What was purged is committed, so entries below the log match by Raft's own promise (§5.4.3, state machine safety).
        start = 0 if span._first >= self._first else <size_t>(self._first - span._first)
        if start >= span._terms.size():
            return span._first + span._terms.size()
        cdef PyThreadState* released = release_gil(<int64_t>span._terms.size() * sizeof(uint64_t))
        conflict = common_prefix(span._terms, start, span._first, self._end() - 1, self._run_firsts, self._run_terms)
        take_gil(released)
        return conflict

    def truncate(self, first):
        self._check_range(first, self._end())
        self._sums.resize(self._head + <size_t>(<uint64_t>first - self._first))
        # The first run stays for ever: it starts at first_index - 1 or before.
        while self._run_firsts.back() >= <uint64_t>first:
            self._run_firsts.pop_back()
            self._run_terms.pop_back()

    def purge(self, end):
        cdef uint64_t keep
        cdef size_t runs
        self._check_range(self._first, end)
        if <uint64_t>end == self._first:
            return
        keep = <uint64_t>end
        self._base = self._sum_before(keep)
        runs = count_up_to(self._run_firsts, 0, self._run_firsts.size(), keep - 1) - 1
        self._run_firsts.erase(self._run_firsts.begin(), self._run_firsts.begin() + runs)
        self._run_terms.erase(self._run_terms.begin(), self._run_terms.begin() + runs)
        self._head += <size_t>(keep - self._first)
        self._first = keep
        if self._head * 2 > self._sums.size():
            self._sums.erase(self._sums.begin(), self._sums.begin() + self._head)
            self._head = 0

    def clip(self, first, end, bytes_max):
        cdef uint64_t limit, start
        cdef size_t low, high, found
        self._check_range(first, end)
        if first == end:
            return end
        start = self._sum_before(first)
        limit = SIZE_MAX_TOTAL - start if bytes_max > SIZE_MAX_TOTAL - start else <uint64_t>max(0, bytes_max)
        limit += start
        low = self._head + <size_t>(<uint64_t>first - self._first)
        high = self._head + <size_t>(<uint64_t>end - self._first)
        found = count_up_to(self._sums, low, high, limit)
        return self._first + (max(found, low + 1) - self._head)

    def bytes(self, first, end):
        self._check_range(first, end)
        return self._sum_before(end) - self._sum_before(first)

    def last_index_at_most_term(self, index, term):
        cdef uint64_t bound, stop
        cdef size_t run
        if index < self._first - 1:
            raise IndexError(f"index {index} is below the log, which starts at {self._first}")
        bound = self._end() - 1 if index > self._end() - 1 else <uint64_t>index
        if term < 0:
            raise ValueError(f"term {term} is negative")
        # Runs are in ascending order of terms: the last run whose term is at most `term` decides.
        run = count_up_to(self._run_terms, 0, self._run_terms.size(), <uint64_t>term)
        if run == 0:
            return self._first - 2 if self._first >= 2 else 0
        if run == self._run_firsts.size():
            return bound
        stop = self._run_firsts[run] - 1
        return stop if stop < bound else bound

    def span(self, first, end):
        cdef EntrySpan span
        cdef size_t k, run, count
        cdef uint64_t index, previous
        self._check_range(first, end)
        span = EntrySpan.__new__(EntrySpan)
        span._first = first
        count = <size_t>(<uint64_t>end - <uint64_t>first)
        if count == 0:
            return span
        index = first
        previous = self._sum_before(index)
        cdef PyThreadState* released = release_gil(<int64_t>count * sizeof(uint64_t))
        span._terms.reserve(count)
        span._sizes.reserve(count)
        run = count_up_to(self._run_firsts, 0, self._run_firsts.size(), index) - 1
        for k in range(count):
            if run + 1 < self._run_firsts.size() and self._run_firsts[run + 1] == index + k:
                run += 1
            span._terms.push_back(self._run_terms[run])
            span._sizes.push_back(self._sums[self._head + (index - self._first) + k] - previous)
            previous = self._sums[self._head + (index - self._first) + k]
        take_gil(released)
        return span

    def __repr__(self):
        return f"TermIndex([{self._first}, {self._end()}): {self._run_terms.size()} runs, last term {self.last_term})"
