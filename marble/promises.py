"""What callers have been promised: the futures of proposals and reads, from when the core takes them until decided.

Rule 1: every future that comes in here goes out decided, exactly once: with its answer, with an error that says what is
known, or, when the engine ends, with that. A proposal is known to have failed only when an entry of a later term is
committed at its index or before it: then no entry of its term can follow (Log Matching, §5.3; terms never fall along a
log). Until then its outcome is open, whoever leads.

Not thread-safe: the engine thread owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from marble._core.entry_batch import Proposal
from marble.errors import MarbleError, OutcomeUnknownError, UnavailableError, UsageError
from marble.machine import Result
from marble.raft.messages import ReadState
from marble.types import EntryKind

_DRIVERS_KINDS: Final = (EntryKind.HARD_STATE, EntryKind.NOOP, EntryKind.MEMBERSHIP, EntryKind.SNAPSHOT)


@dataclass(frozen=True, slots=True)
class Committed:
    """The answer to a proposal: it is durable on a quorum and applied here.

    A repeat within a session has the ``index`` and ``value`` of the first of its kind, and the ``term`` of its own entry.
    """

    index: int
    term: int
    value: int


class Lane:
    """What the offers of one stream share: once one of them is refused, those after it are, or they would overtake it.

    ``refusal`` is the engine thread's.
    """

    __slots__ = ("refusal",)

    def __init__(self) -> None:
        self.refusal: MarbleError | None = None


def check_proposal(proposal: Proposal, bytes_max: int) -> None:
    """Raise UsageError unless a user may propose `proposal`, of at most `bytes_max` bytes.

    Who the members are, and where leadership begins, is in entries that only the driver makes: an entry of such a kind from
    elsewhere would take effect without the core's checks.
    """
    if proposal.kind in _DRIVERS_KINDS:
        raise UsageError(f"entries of kind {proposal.kind.name} are made by the node alone")
    if proposal.nbytes > bytes_max:
        raise UsageError(
            f"the entry takes {proposal.nbytes} bytes, more than max_entry_size ({bytes_max}): write smaller batches"
        )


class Offer(NamedTuple):
    """A proposal on its way to the core; under the leadership of `term` only, and in `lane`, if these are not None.

    ``came``: when it was made, in seconds of the node's monotonic clock.
    """

    proposal: Proposal
    future: Future[Committed]
    term: int | None
    lane: Lane | None = None
    came: float | None = None


@dataclass(slots=True)
class _Write:
    term: int
    future: Future[Committed]
    deadline: float


@dataclass(slots=True)
class _Read:
    """``index`` is 0 until the core has answered; ``ticks`` counts since it was last asked."""

    future: Future[int]
    deadline: float
    lease: bool = False
    index: int = 0
    ticks: int = 0


class IndexFuture(Future[Any]):
    """What is told where an entry was committed, and gives out the index alone."""

    def set_result(self, result: Committed) -> None:
        super().set_result(result.index)


def promise(future: Future[Any] | None = None) -> Future[Any]:
    """A future, a new one unless it is given, that a caller cannot cancel: what was proposed cannot be called back."""
    future = Future() if future is None else future
    future.set_running_or_notify_cancel()
    return future


class Promises:
    """Futures of proposals by index, and of reads by request number.

    - Several proposals may wait at one index: this node led, lost the lead, and led again. At most one of them comes true.
    - A read is known to the core under one number at a time; an answer to an older number no longer counts.

    Parameters
    ----------
    write_timeout_s, read_timeout_s
        How long one may stay undecided.
    ask
        Asks the core for a read index under a new number; by lease if the second argument says so.
    ask_again_ticks
        A read that the core has not answered for so long is asked again: question or answer was lost.
    confirm_timeout_s
        A read that no leader has confirmed for so long is refused; at once, if no leader is known for so long already.
        None: as `read_timeout_s`, which what a leader has confirmed may take until it is applied here.
    """

    def __init__(
        self,
        write_timeout_s: float,
        read_timeout_s: float,
        ask: Callable[[int, bool], None],
        ask_again_ticks: int,
        confirm_timeout_s: float | None = None,
    ) -> None:
        self._write_timeout_s = write_timeout_s
        self._read_timeout_s = read_timeout_s
        self._confirm_timeout_s = read_timeout_s if confirm_timeout_s is None else confirm_timeout_s
        self._leaderless_since: float | None = None
        self._ask = ask
        self._ask_again_ticks = ask_again_ticks
        self._writes: dict[int, list[_Write]] = {}
        self._reads: dict[int, _Read] = {}
        self._next_request = 1
        self._applied_term = 0

    def add_writes(self, first: int, term: int, futures: Iterable[Future[Committed]], now: float) -> None:
        """The core took these proposals at `first` and the indexes after it, in `term`."""
        deadline = now + self._write_timeout_s
        for index, future in enumerate(futures, first):
            self._writes.setdefault(index, []).append(_Write(term, future, deadline))

    def add_read(self, future: Future[int], now: float, lease: bool = False) -> None:
        """Ask the core for a read index; `lease`: one that rests on a lease will do."""
        if self._leaderless_since is not None and now - self._leaderless_since >= self._confirm_timeout_s:
            future.set_exception(self._unconfirmed())
        else:
            self._begin(_Read(future, now + self._read_timeout_s, lease))

    def led(self, led: bool, now: float) -> None:
        """A leader is known from now on, or none is."""
        if led:
            self._leaderless_since = None
        elif self._leaderless_since is None:
            self._leaderless_since = now

    @property
    def any(self) -> bool:
        """Whether anybody waits."""
        return bool(self._writes or self._reads)

    def applied(self, first: int, terms: Sequence[int], results: Sequence[Result]) -> None:
        """These entries were applied here: whoever waits at their indexes, or in an older term, gets an answer."""
        if not self._writes:
            return
        for index, (term, result) in enumerate(zip(terms, results, strict=True), first):
            for write in self._writes.pop(index, ()):
                if write.term != term:
                    write.future.set_exception(_overtaken())
                    continue
                try:
                    value = result.raise_for_error()
                except MarbleError as error:
                    write.future.set_exception(error)
                else:
                    write.future.set_result(Committed(result.index or index, term, value))
        if terms[-1] > self._applied_term:
            self._applied_term = terms[-1]
            self._end_older(first, terms[-1])

    def _end_older(self, first: int, term: int) -> None:
        """Entries from `first` on, up to one of `term`, were applied: writes of older terms that still wait behind it cannot
        be. Before `first` none would wait had not a snapshot taken the place of their entries: it may have them.
        """
        for index, writes in list(self._writes.items()):
            if kept := [write for write in writes if write.term >= term]:
                self._writes[index] = kept
            else:
                del self._writes[index]
            for write in writes:
                if write.term < term:
                    write.future.set_exception(_overtaken() if index >= first else _skipped(index, write.term))

    def answered(self, reads: Iterable[ReadState], applied_index: int) -> list[float]:
        """The core answered `reads`, and everything up to `applied_index` is applied here.

        Returns when those were asked for that have their answer now.
        """
        if not self._reads:
            return []
        for answer in reads:
            read = self._reads.get(answer.request)
            if read is not None:
                # Index 0: the core dropped it. `expire` asks again, perhaps of another leader.
                read.index = answer.index
        begun = []
        for request in [request for request, read in self._reads.items() if 0 < read.index <= applied_index]:
            read = self._reads.pop(request)
            read.future.set_result(applied_index)
            begun.append(read.deadline - self._read_timeout_s)
        return begun

    def expire(self, now: float) -> None:
        """Once a tick: end what has waited too long, and repeat questions that were lost."""
        for index in [index for index, writes in self._writes.items() if writes[0].deadline <= now]:
            writes = self._writes.pop(index)
            if late := [write for write in writes if write.deadline > now]:
                self._writes[index] = late
            for write in writes:
                if write.deadline <= now:
                    write.future.set_exception(
                        OutcomeUnknownError(
                            f"entry {index} of term {write.term} was not decided within {self._write_timeout_s:g} s: "
                            "it may still be committed"
                        )
                    )
        for request, read in list(self._reads.items()):
            read.ticks += 1
            if not read.index and now - (read.deadline - self._read_timeout_s) >= self._confirm_timeout_s:
                del self._reads[request]
                read.future.set_exception(self._unconfirmed())
            elif read.deadline <= now:
                del self._reads[request]
                read.future.set_exception(
                    UnavailableError(f"the read's index was not applied here within {self._read_timeout_s:g} s: retry")
                )
            elif not read.index and read.ticks > self._ask_again_ticks:
                del self._reads[request]
                self._begin(read)

    def abandon(self, gone: MarbleError) -> None:
        """The engine has ended because of `gone`: answer everyone who still waits."""
        writes, self._writes = self._writes, {}
        reads, self._reads = self._reads, {}
        for index, waiting in writes.items():
            for write in waiting:
                write.future.set_exception(OutcomeUnknownError(f"the node stopped before entry {index} was decided"))
        for read in reads.values():
            read.future.set_exception(gone)

    def _unconfirmed(self) -> UnavailableError:
        return UnavailableError(
            f"no leader confirmed the read within {self._confirm_timeout_s:g} s: this node may be cut off; ask another one"
        )

    def _begin(self, read: _Read) -> None:
        request, self._next_request = self._next_request, self._next_request + 1
        read.ticks = 0
        self._reads[request] = read
        self._ask(request, read.lease)


def _skipped(index: int, term: int) -> OutcomeUnknownError:
    return OutcomeUnknownError(
        f"another leader took over, and a snapshot of it covers entry {index} of term {term}: it may have been committed"
    )


def _overtaken() -> UnavailableError:
    return UnavailableError("another leader took over before the write was replicated: nothing was written; retry")
