"""ReadIndex: linearizable reads without writing to the log (thesis §6.4).

Rule 1: a context is made here and nowhere else, and never twice. It counts up from a random start, so an answer to an
earlier life of this node cannot pass for an answer to this one.

A leader's read goes through two gates: it is ``deferred`` until the leader has committed an entry of its own term (only
then is its commit index the group's, Raft §8), and then ``waiting`` until a quorum has answered a heartbeat that was
sent after the read came in. All reads that come in between two rounds share the next one. A follower's read is
``forwarded`` to its leader and comes back as an index.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from marble.raft.messages import ReadState

READS_MAX: Final = 1 << 16
"""Reads that may be pending at once; more are told to ask again. Bounds memory where no quorum answers."""


ROUNDS_MAX: Final = 64
"""Unanswered rounds of heartbeats remembered for leases: an answer to an older one would give no lease any more."""


@dataclass(frozen=True, slots=True)
class PendingRead:
    """A read at its leader: `requester` asked under `request` (a caller's number if it is this node, else the
    requester's context).
    """

    requester: int
    request: int
    index: int = 0
    context: int = 0


class Reads:
    """Pending reads of one node.

    - ``_waiting`` ascends in context; every context in it is at most ``last_context``.
    - Only a leader has deferred or waiting reads; only a follower with a known leader has forwarded ones.
    """

    __slots__ = ("_acks", "_deferred", "_forwarded", "_waiting", "answers", "last_context", "round_due", "rounds")

    def __init__(self, first_context: int) -> None:
        self.last_context = first_context
        # A read waits for a round of heartbeats that has not been sent yet.
        self.round_due = False
        # Reads of this node that are decided, for the next Ready.
        self.answers: list[ReadState] = []
        # Rounds of heartbeats that a quorum has not answered yet: (context, when it was sent at the earliest, in µs).
        self.rounds: deque[tuple[int, int]] = deque()
        self._deferred: list[PendingRead] = []
        self._waiting: deque[PendingRead] = deque()
        # The latest context that each peer has answered.
        self._acks: dict[int, int] = {}
        # context -> (caller's number, ticks left until the answer counts as lost)
        self._forwarded: dict[int, tuple[int, int]] = {}

    @property
    def full(self) -> bool:
        """Whether no more reads are taken."""
        return len(self._deferred) + len(self._waiting) + len(self._forwarded) >= READS_MAX

    @property
    def round_context(self) -> int:
        """What a heartbeat must carry to confirm all that waits; 0 if nothing does."""
        return self._waiting[-1].context if self._waiting else 0

    @property
    def pending(self) -> bool:
        """Whether anybody waits for an answer of this leader."""
        return bool(self._waiting or self._deferred)

    @property
    def forwarding(self) -> bool:
        """Whether anybody waits for an answer of this follower's leader."""
        return bool(self._forwarded)

    def open_round(self, now_us: int) -> int:
        """A round of heartbeats goes out, for a lease, whether or not a read waits. Returns its context."""
        if not self.round_due:
            self.last_context += 1
        self.rounds.append((self.last_context, now_us))
        if len(self.rounds) > ROUNDS_MAX:
            self.rounds.popleft()
        return self.last_context

    def confirmed_since(self, context: int) -> int:
        """A quorum has answered `context`: when the latest round that this confirms was sent; 0 if none was open."""
        sent_us = 0
        while self.rounds and self.rounds[0][0] <= context:
            sent_us = self.rounds.popleft()[1]
        return sent_us

    def answer(self, request: int, index: int) -> None:
        """Tell this node's caller; index 0: ask again."""
        self.answers.append(ReadState(request, index))

    def take_answers(self) -> tuple[ReadState, ...]:
        """Hand out what is decided."""
        answers, self.answers = tuple(self.answers), []
        return answers

    def defer(self, read: PendingRead) -> None:
        """Keep `read` until the leader has committed in its own term."""
        self._deferred.append(read)

    def take_deferred(self) -> list[PendingRead]:
        """The leader has committed in its own term: hand back what waited for that."""
        deferred, self._deferred = self._deferred, []
        return deferred

    def wait(self, read: PendingRead, commit_index: int) -> None:
        """Let `read` wait for the next round; it will read at `commit_index`."""
        if not self.round_due:
            self.round_due = True
            self.last_context += 1
        self._waiting.append(PendingRead(read.requester, read.request, commit_index, self.last_context))

    def acknowledge(self, peer: int, context: int) -> None:
        """`peer` answered the heartbeat with `context`. One that was never sent confirms nothing."""
        if 0 < context <= self.last_context:
            self._acks[peer] = max(self._acks.get(peer, 0), context)

    @property
    def acks(self) -> Mapping[int, int]:
        """The latest context that each peer has answered in this leadership."""
        return self._acks

    def take_confirmed(self, context: int) -> list[PendingRead]:
        """A quorum has answered `context`: hand out all reads that this confirms."""
        confirmed = []
        while self._waiting and self._waiting[0].context <= context:
            confirmed.append(self._waiting.popleft())
        # A group of one is its own quorum: no round is needed any more.
        self.round_due = self.round_due and bool(self._waiting)
        return confirmed

    def forward(self, request: int, patience_ticks: int) -> int:
        """Note that `request` goes to the leader. Returns the context to send."""
        self.last_context += 1
        self._forwarded[self.last_context] = (request, patience_ticks)
        return self.last_context

    def resolve(self, context: int, index: int) -> None:
        """The leader answered. Contexts that are not pending are old or not ours."""
        pending = self._forwarded.pop(context, None)
        if pending is not None:
            self.answer(pending[0], index)

    def tick(self) -> None:
        """Messages get lost: tell callers to ask again rather than let them hang on a leader that is well."""
        for context, (request, patience_ticks) in list(self._forwarded.items()):
            if patience_ticks <= 1:
                del self._forwarded[context]
                self.answer(request, 0)
            else:
                self._forwarded[context] = (request, patience_ticks - 1)

    def drop_forwarded(self) -> None:
        """The leader that was asked is no longer known to lead."""
        for request, _ in self._forwarded.values():
            self.answer(request, 0)
        self._forwarded.clear()

    def drop_leading(self, node: int) -> list[PendingRead]:
        """`node` no longer leads: answer its own reads with 0, and hand back those of others."""
        dropped = [*self._waiting, *self._deferred]
        self._waiting.clear()
        self._deferred.clear()
        self._acks.clear()
        self.round_due = False
        for read in dropped:
            if read.requester == node:
                self.answer(read.request, 0)
        return [read for read in dropped if read.requester != node]
