"""Where the callers of one group stand: what they have offered and the core has not taken, and what they have been promised.

Rule 1: offers reach the core in the order in which they came. What the core has no room for waits, with all that came after
it; refusing one and taking the next would leave a gap in somebody's stream.

The engine thread owns it; `role`, `leader`, `leading_term`, `alone`, `members` and `endpoints` may be read, and `wait_for_leader`
called, on any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from marble.driver import Driver, Outcome
from marble.errors import MarbleError, NotLeaderError, UnavailableError, UsageError
from marble.logs import fields
from marble.machine import StoredMachine
from marble.metrics import Metrics
from marble.options import NodeOptions
from marble.promises import Committed, Offer, Promises
from marble.raft.messages import RoleChanged
from marble.stopwatch import Stopwatch
from marble.types import NO_NODE, Change, ChangeKind, Members, Role, Transition

logger = logging.getLogger("marble.raft")


class _Handover(NamedTuple):
    """Somebody waits for `target` to lead."""

    target: int
    future: Future[None]
    deadline: float


class Desk:
    """Callers of one group of one node.

    Parameters
    ----------
    options
        Deadlines.
    driver
        The group's.
    release
        Told how many bytes of proposals no longer wait here.
    log_bytes
        How large the log is.
    now_us
        The monotonic clock, for leases.
    metrics
        Where counters go.
    """

    def __init__(
        self,
        options: NodeOptions,
        driver: Driver,
        release: Callable[[int], None],
        log_bytes: Callable[[], int],
        now_us: Callable[[], int],
        metrics: Metrics | None = None,
    ) -> None:
        self.driver = driver
        self.promises = Promises(
            options.propose_timeout_s,
            options.read_timeout_s,
            lambda request, lease: driver.raft.read_index(request, now_us(), lease),
            ask_again_ticks=options.heartbeat_ticks,
            confirm_timeout_s=options.confirm_timeout_s,
        )
        self.role = Role.FOLLOWER
        self.leader = NO_NODE
        self.leading_term = 0
        self.alone = False
        """Whether nobody else takes part, and this node leads and has applied all that was committed before it did. Then what it
        has applied is all that was ever acknowledged: others who come to take part can commit nothing without it before a turn
        has ended in which they came, and with that this is False."""
        self.members: Members = driver.raft.members
        self.endpoints: Mapping[int, str] = driver.endpoints
        self._options = options
        self._sole = self.members.all == (options.node_id,)
        self._applied_term = 0
        self._release_bytes = release
        self._log_bytes = log_bytes
        self._now_us = now_us
        metrics = metrics or Metrics()
        self._watch = Stopwatch(metrics)
        self._leaders = metrics.counter("leader_changes")
        self._stored = driver.machine if isinstance(driver.machine, StoredMachine) else None
        self._offers: list[Offer] = []
        self._stalled_since: float | None = None
        self._handovers: list[_Handover] = []
        self._snapshots: list[tuple[int, Future[int]]] = []
        """Who waits for a snapshot, and what had been applied when it was asked for."""
        self._changed = threading.Condition()

    @property
    def leader_endpoint(self) -> str | None:
        """Where the leader is, as far as this node knows."""
        return self.endpoints.get(self.leader)

    def offer(self, offer: Offer) -> None:
        """Take an offer in, to be proposed with all others of this turn."""
        self._offers.append(offer)

    def propose(self, now: float) -> bool:
        """Offer the core what has gathered. What it has no room for now waits, in order, and is to be offered again.

        Returns whether anything waits so.
        """
        raft = self.driver.raft
        leading = raft.term if raft.role is Role.LEADER else 0
        self._refuse_lanes()
        over = [offer for offer in self._offers if offer.term not in (None, leading)]
        batch = [offer for offer in self._offers if offer.term in (None, leading)] if over else self._offers
        self._offers = []
        self._refuse(over, NotLeaderError("this node's leadership is over"))
        limit = self._options.log_bytes_max
        if limit is not None and self._log_bytes() > limit:
            # A snapshot should have made room before. If one can be written by now, it will.
            self.driver.request_snapshot()
            error = UnavailableError(f"the log has {self._log_bytes()} bytes, more than max_log_size ({limit}): retry")
            self._refuse(batch, error)
            return False
        stalled_since, self._stalled_since = self._stalled_since, None
        if not batch:
            return False
        try:
            self._check_backlog()
            first = self.driver.propose([offer.proposal for offer in batch])
        except NotLeaderError as not_leader:
            self._refuse(batch, not_leader)
        except UnavailableError as full:
            stalled_since = now if stalled_since is None else stalled_since
            if now - stalled_since < self._options.propose_timeout_s:
                self._offers, self._stalled_since = batch, stalled_since
            else:
                self._refuse(batch, full)
        else:
            self._release(batch)
            self._watch.took(first.index, batch, now)
            self.promises.add_writes(first.index, first.term, [offer.future for offer in batch], now)
        return bool(self._offers)

    def _check_backlog(self) -> None:
        """Raise UnavailableError while the machine's files lag too far behind: who writes waits, who applies never does."""
        limit = self._options.backlog_bytes_max
        if self._stored is not None and self._stored.backlog_bytes > limit:
            raise UnavailableError(
                f"tables are written faster than their files: {self._stored.backlog_bytes} bytes wait, more than {limit}"
            )

    def change_membership(
        self,
        changes: Sequence[Change],
        endpoints: Mapping[int, str],
        transition: Transition,
        future: Future[Committed],
        now: float,
    ) -> None:
        """Propose a change; `future` gets its answer."""
        try:
            known = self.driver.peers.keys() | endpoints.keys() | self.endpoints.keys()
            for change in changes:
                if change.kind is not ChangeKind.REMOVE and change.node not in known:
                    raise UsageError(f"say where node {change.node} is reached: nobody knows an endpoint of it")
            position = self.driver.propose_membership(changes, endpoints, transition)
        except (UsageError, NotLeaderError, UnavailableError) as error:
            future.set_exception(self._placed(error))
        else:
            self.promises.add_writes(position.index, position.term, [future], now)

    def transfer_leadership(self, target: int, future: Future[None], now: float) -> None:
        """Hand the leadership over; `future` ends when `target` leads, or does not in time."""
        try:
            self.driver.raft.transfer_leadership(target)
        except (UsageError, NotLeaderError) as error:
            future.set_exception(self._placed(error))
        else:
            self._handovers.append(_Handover(target, future, now + self._options.propose_timeout_s))

    def snapshot(self, future: Future[int]) -> None:
        """Take a snapshot; `future` gets the index at which it stands."""
        self._snapshots.append((self.driver.raft.applied_index, future))
        self.driver.request_snapshot()

    def tick(self, now: float) -> bool:
        """A tick has passed: end what has waited too long. Returns whether the core may have heard of it."""
        late = [handover for handover in self._handovers if handover.deadline <= now]
        for handover in late:
            self._handovers.remove(handover)
            handover.future.set_exception(UnavailableError(f"node {handover.target} did not take over in time"))
        if not self.promises.any:
            return False
        self.promises.expire(now)
        return True

    def publish(self) -> Outcome:
        """Tell those who wait what the last turn decided, and return it."""
        outcome = self.driver.take_outcome()
        for applied in outcome.applied:
            self.promises.applied(applied.first, applied.terms, applied.results)
            self._applied_term = applied.terms[-1]
        raft = self.driver.raft
        if begun := self.promises.answered(outcome.reads, raft.applied_index):
            self._watch.confirmed(begun, self._now_us() / 1_000_000)
        if self._watch.any:
            self._watch.reached(raft.commit_index, raft.applied_index, self._now_us() / 1_000_000)
        if outcome.members_changed:
            self.members, self.endpoints = self.driver.raft.members, self.driver.endpoints
            self._sole = self.members.all == (self._options.node_id,)
        for event in outcome.events:
            self._note(event)
        self.alone = self._sole and 0 != self.leading_term == self._applied_term
        for answer in outcome.snapshots:
            self._answer_snapshots(answer)
        if self._handovers:
            self._check_handovers()
        return outcome

    def _answer_snapshots(self, answer: int | Exception) -> None:
        # One that was being written when another was asked for is not the one that was asked for.
        late = [each for each in self._snapshots if isinstance(answer, int) and answer < each[0]]
        waiting = [future for asked, future in self._snapshots if not isinstance(answer, int) or answer >= asked]
        self._snapshots = late
        for future in waiting:
            if isinstance(answer, int):
                future.set_result(answer)
            else:
                future.set_exception(UnavailableError(f"no snapshot could be taken: {answer}"))

    def _check_handovers(self) -> None:
        raft = self.driver.raft
        waiting, self._handovers = self._handovers, []
        for handover in waiting:
            if raft.leader == handover.target:
                handover.future.set_result(None)
            elif raft.role is Role.LEADER and raft.transferee != handover.target:
                handover.future.set_exception(
                    UnavailableError(f"node {handover.target} did not take over: this node still leads; retry")
                )
            elif raft.leader not in (NO_NODE, raft.id):
                handover.future.set_exception(UnavailableError(f"node {raft.leader} leads, not {handover.target}"))
            else:
                self._handovers.append(handover)

    def wait_for_leader(self, timeout_s: float, give_up: Callable[[], bool]) -> bool:
        """Wait on a caller's thread until a leader is known or `give_up` says so; False after `timeout_s` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.leader != NO_NODE or give_up(), timeout_s)

    def abandon(self, gone: MarbleError) -> None:
        """The engine has ended because of `gone`: answer everyone who still waits."""
        offers, self._offers = self._offers, []
        for offer in offers:
            offer.future.set_exception(gone)
        self.promises.abandon(gone)
        for handover in self._handovers:
            handover.future.set_exception(gone)
        for _, future in self._snapshots:
            future.set_exception(gone)
        self._handovers, self._snapshots = [], []
        with self._changed:
            self.role, self.leader, self.alone = Role.FOLLOWER, NO_NODE, False
            self._changed.notify_all()

    def _refuse(self, offers: list[Offer], error: MarbleError) -> None:
        self._release(offers)
        error = self._placed(error)
        for offer in offers:
            if offer.lane is not None:
                offer.lane.refusal = error
            offer.future.set_exception(error)

    def _refuse_lanes(self) -> None:
        """Refuse what would overtake an earlier offer of its lane."""
        kept: list[Offer] = []
        for offer in self._offers:
            refusal = None if offer.lane is None else offer.lane.refusal
            if refusal is None:
                kept.append(offer)
            else:
                self._refuse([offer], refusal)
        self._offers = kept

    def _placed(self, error: MarbleError) -> MarbleError:
        """`error`, with the place of the leader: the core knows ids only, and a caller needs to know where to go."""
        return NotLeaderError(str(error), self.leader_endpoint) if isinstance(error, NotLeaderError) else error

    def _release(self, offers: list[Offer]) -> None:
        if offers:
            self._release_bytes(sum(offer.proposal.nbytes for offer in offers))

    def _note(self, event: RoleChanged) -> None:
        leader = event.leader or "unknown"
        logger.info(
            "node %d is %s of group %d in term %d, leader %s",
            self._options.node_id,
            event.role.value,
            self.driver.group,
            event.term,
            leader,
            extra=fields(node=self._options.node_id, group=self.driver.group, term=event.term, role=event.role.value),
        )
        if event.leader not in (NO_NODE, self.leader) and len(self.members.all) > 1:
            self._leaders.add()
        self.promises.led(event.leader != NO_NODE, self._now_us() / 1_000_000)
        with self._changed:
            self.role, self.leader = event.role, event.leader
            leading_term = event.term if event.role is Role.LEADER else 0
            if leading_term != self.leading_term:
                self._watch.lost()
            self.leading_term = leading_term
            self._changed.notify_all()
