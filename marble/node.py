"""A running node: one engine thread that owns the drivers, a bounded inbox before it, and the clock behind it.

Rule 1: everything that touches a driver, the log or the state machine's writing side happens on the engine thread. Other
threads (callers, Flight handlers) post to the inbox and wait on futures; readers of tables need no thread of ours at all.

Life: `Node` (opens the log, replays it) -> `start` -> `stop`. The engine ends by itself only when it must not go on (a failed
sync, a broken invariant): then `failure` says why, every waiting caller gets an error, and `stopped` is set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, Protocol, TypeVar

from marble._core.entry_batch import Proposal
from marble._core.term_index import TermIndex
from marble.driver import Driver, DurableState, turn
from marble.env import Clock, Files, Random, SystemClock, SystemRandom
from marble.errors import (
    CorruptionError,
    InvariantError,
    MarbleError,
    NotLeaderError,
    ProtocolError,
    UnavailableError,
    UsageError,
)
from marble.identity import LOCK_FILE, bind
from marble.logstore.log import Log, LogOptions
from marble.machine import StateMachine
from marble.metrics import Metrics
from marble.options import NodeOptions
from marble.promises import Committed, Offer, Promises, promise
from marble.raft.config import RaftConfig
from marble.raft.core import Raft
from marble.raft.messages import RoleChanged
from marble.transport.codec import Envelope
from marble.types import NO_NODE, HardState, Members, Role

logger = logging.getLogger("marble.node")

GROUP: Final = 0
"""The one group of a node, until there are many."""
T = TypeVar("T")


class Transport(Protocol):
    """What the node needs of `marble.transport.flight.FlightTransport`."""

    def send(self, to: int, envelopes: list[Envelope]) -> bool: ...


class Node:
    """One member of a cluster. Thread-safe, except that `start` and `stop` belong to one caller.

    Parameters
    ----------
    options
        Identity, cluster and limits.
    files
        The data directory.
    machine
        What committed entries are applied to; must be empty.
    transport
        Carries messages to peers; None for a cluster of one.
    clock, random
        Time and chance; the system's by default.
    metrics
        Where counters go.

    Raises
    ------
    UnavailableError
        If another process holds the directory.
    UsageError
        If the directory belongs to another node or cluster.
    CorruptionError
        If the log is damaged, or has lost bytes that other nodes were told are durable.
    """

    def __init__(
        self,
        options: NodeOptions,
        files: Files,
        machine: StateMachine,
        transport: Transport | None = None,
        *,
        clock: Clock | None = None,
        random: Random | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        if options.node_id not in options.endpoints:
            raise UsageError(f"node {options.node_id} is not among the cluster's nodes {sorted(options.endpoints)}")
        # The size of a frame stays as it is: a smaller one could not read what an earlier run wrote.
        log_options = LogOptions(options.segment_bytes_max, options.cache_bytes_max)
        if options.entry_bytes_max > log_options.entry_bytes_max:
            raise UsageError(
                f"max_entry_size {options.entry_bytes_max} is above {log_options.entry_bytes_max}, the most that fits the log"
            )
        self.options = options
        self.machine = machine
        self.metrics = metrics or Metrics()
        self.failure: BaseException | None = None
        self.stopped = threading.Event()
        self._files = files
        self._transport = transport
        self._clock = clock or SystemClock()
        self._random = random or SystemRandom()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._inbox_lock = threading.Lock()
        self._inbox_bytes = 0
        self._batching: list[Offer] = []
        self._stalled_since: float | None = None
        self._closing = False
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._view = threading.Condition()
        self._role = Role.FOLLOWER
        self._leader = NO_NODE
        self._leading_term = 0
        self._resources = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            files.make_directory("")
            stack.enter_context(files.lock(LOCK_FILE))
            bind(files, options.cluster_id, options.node_id)
            self._log = Log.open(files, log_options)
            stack.callback(self._log.close)
            self._driver = self._recover()
            self._promises = Promises(
                options.propose_timeout_s,
                options.read_timeout_s,
                self._driver.raft.read_index,
                ask_again_ticks=options.heartbeat_ticks,
            )
            self._resources = stack.pop_all()

    # -- what callers see ------------------------------------------------------------------------------------------

    @property
    def role(self) -> Role:
        """This node's role as of the engine's last turn."""
        return self._role

    @property
    def leading_term(self) -> int:
        """The term that this node leads, as of the engine's last turn; 0 if it does not lead."""
        return self._leading_term

    @property
    def leader_endpoint(self) -> str | None:
        """``host:port`` of the leader as far as this node knows."""
        return self.options.endpoints.get(self._leader)

    @property
    def is_running(self) -> bool:
        """True between `start` and the engine's end."""
        return self._thread is not None and not self.stopped.is_set()

    def start(self) -> None:
        """Replay what is known to be committed, then start the engine. A cluster of one leads when this returns."""
        if self._thread is not None:
            raise UsageError("a node starts once: make a new one")
        turn([self._driver], self._log)
        if len(self.options.endpoints) == 1:
            self._driver.raft.campaign()
            turn([self._driver], self._log)
        self._publish()
        self._thread = threading.Thread(target=self._run, name=f"marble-engine-{self.options.node_id}", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the engine and close the log. Undecided proposals end in OutcomeUnknownError. Idempotent.

        Raises
        ------
        UnavailableError
            If the engine does not end in time (a disk that hangs). The directory then stays locked.
        """
        self._closing = True
        if self._thread is not None:
            self._inbox.put(lambda: None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise UnavailableError(f"the engine of node {self.options.node_id} did not end within {timeout_s} s")
        self.stopped.set()
        self._resources.close()

    def propose(self, proposal: Proposal, term: int | None = None) -> Future[Committed]:
        """Offer `proposal` for the log; if `term` is given, only under this node's leadership of that term.

        What is offered under one term takes effect in the order in which it was offered, without gaps: after one that was
        refused because the leadership is over, none of it can be accepted any more. The future ends with `Committed`, or
        with NotLeaderError or UnavailableError (nothing was replicated), OutcomeUnknownError, or the error that
        applying it gave on every replica.
        """
        future: Future[Committed] = promise()
        size = proposal.nbytes
        if size > self.options.entry_bytes_max:
            raise UsageError(
                f"the entry takes {size} bytes, more than max_entry_size ({self.options.entry_bytes_max}): write smaller batches"
            )
        with self._inbox_lock:
            self._check_running()
            if self._inbox_bytes and self._inbox_bytes + size > self.options.inbox_bytes_max:
                self.metrics.counter("proposals_refused").add(1)
                raise UnavailableError(
                    "too many proposals wait on this node: retry later, or keep fewer writes in flight"
                )
            self._inbox_bytes += size
            self._inbox.put(lambda: self._batching.append(Offer(proposal, future, term)))
        return future

    def read_index(self) -> Future[int]:
        """An index that this node has applied and that makes a read of its tables, from now on, linearizable.

        The future ends with the index, or with UnavailableError (no leader could be asked in time: retry).
        """
        future: Future[int] = promise()
        self._post(lambda: self._promises.add_read(future, self._clock.monotonic()), future)
        return future

    def call(self, function: Callable[[Raft], T]) -> Future[T]:
        """Run `function` on the engine thread, between turns."""
        future: Future[T] = promise()

        def run() -> None:
            try:
                future.set_result(function(self._driver.raft))
            except BaseException as error:
                future.set_exception(error)
                # What is neither the caller's fault nor a matter of time is ours: the engine must not go on.
                if not (isinstance(error, UsageError | NotLeaderError | UnavailableError) or self.stopped.is_set()):
                    raise

        self._post(run, future)
        return future

    def campaign(self) -> None:
        """Ask this node to stand for election now (a pre-vote still protects a healthy leader)."""
        self._ask(lambda raft: raft.campaign())

    def receive(self, envelopes: list[Envelope]) -> None:
        """Take a peer's messages; called by the transport's threads. Full inbox: they are dropped and counted."""
        if self.stopped.is_set():
            return
        if self._inbox.qsize() >= self.options.inbox_messages_max:
            self.metrics.counter("messages_dropped_inbox_full").add(len(envelopes))
            return
        self._inbox.put(lambda: self._receive(envelopes))

    def unreachable(self, peer: int) -> None:
        """The transport lost the link to `peer`."""
        self._inbox.put(lambda: self._driver.raft.report_unreachable(peer))

    def fail(self, error: BaseException) -> None:
        """Stop the engine because of `error`, which is marble's own: nothing that follows could be trusted."""

        def stop() -> None:
            if not self.stopped.is_set():  # Else the engine has ended already and is answering who still waits.
                raise error

        self._inbox.put(stop)

    def wait_for_leader(self, timeout_s: float) -> int:
        """Wait until this node knows a leader; return its id. Raises UnavailableError after `timeout_s` seconds."""
        with self._view:
            if not self._view.wait_for(lambda: self._leader != NO_NODE or self.stopped.is_set(), timeout_s):
                raise UnavailableError(f"no leader was known to node {self.options.node_id} within {timeout_s} s")
        if self.stopped.is_set():
            raise self._gone()
        return self._leader

    def status(self) -> dict[str, Any]:
        """A picture of this node, taken between turns: JSON-able. Raises UnavailableError if the engine does not answer."""
        return self._ask(self._status)

    def _ask(self, function: Callable[[Raft], T]) -> T:
        try:
            return self.call(function).result(self.options.read_timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"the engine of node {self.options.node_id} does not answer (a slow disk?)"
            ) from None

    # -- opening ---------------------------------------------------------------------------------------------------

    def _recover(self) -> Driver:
        options, report = self.options, self._log.report
        if report.lost_durable_bytes:
            where = (report.cut_path, report.cut_offset)
            if len(options.endpoints) > 1:
                raise CorruptionError(
                    f"the log ends {report.lost_durable_bytes} bytes before what this node had told its peers is durable; "
                    "it must not vote with this log",
                    *where,
                )
            logger.error("the log ended %d bytes before what was durable; they are lost", report.lost_durable_bytes)
        group = self._log.groups.get(GROUP)
        state = DurableState(
            hard_state=group.hard_state if group else HardState(),
            members=Members(tuple(sorted(options.endpoints))),
            term_index=group.term_index if group else TermIndex(),
        )
        config = RaftConfig(
            id=options.node_id,
            election_ticks=options.election_ticks,
            heartbeat_ticks=options.heartbeat_ticks,
            pre_vote=options.pre_vote,
            check_quorum=options.check_quorum,
            append_bytes_max=options.append_bytes_max,
            inflight_messages_max=options.inflight_messages_max,
            inflight_bytes_max=options.inflight_bytes_max,
            uncommitted_bytes_max=options.uncommitted_bytes_max,
            random=self._random,
        )
        return Driver(GROUP, Raft(config, state), self._log, self.machine, self._send)

    # -- the engine thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self.failure = error
            logger.exception("the engine of node %d stops", self.options.node_id)
        finally:
            with self._inbox_lock:
                self.stopped.set()
            self._abandon()
            with self._view:
                self._role, self._leader = Role.FOLLOWER, NO_NODE
                self._view.notify_all()

    def _loop(self) -> None:
        tick_s = self.options.tick_ms / 1000
        next_tick = self._clock.monotonic() + tick_s
        while not self._closing:
            try:
                self._inbox.get(timeout=max(0.0, next_tick - self._clock.monotonic()))()
                # What has gathered meanwhile shares this turn and its sync. The count bounds a turn under a flood.
                for _ in range(self._inbox.qsize()):
                    self._inbox.get_nowait()()
            except queue.Empty:
                pass
            self._propose_batch()
            now = self._clock.monotonic()
            if now >= next_tick:
                # A process that was paused does not make up for lost ticks: its peers' answers still wait in the inbox.
                next_tick = max(next_tick + tick_s, now)
                self._driver.tick()
                self._promises.expire(now)
            turn([self._driver], self._log)
            self._publish()

    def _send(self, to: int, envelopes: list[Envelope]) -> bool:
        return self._transport is not None and self._transport.send(to, envelopes)

    def _receive(self, envelopes: list[Envelope]) -> None:
        for envelope in envelopes:
            if envelope.group != GROUP or envelope.message.to != self.options.node_id:
                self.metrics.counter("messages_misdirected").add(1)
                continue
            try:
                self._driver.receive(envelope)
            except ProtocolError as error:
                # A peer's fault, and it changed nothing here.
                self.metrics.counter("messages_refused").add(1)
                logger.warning("node %d drops a message: %s", self.options.node_id, error)

    def _propose_batch(self) -> None:
        """Offer the core what has gathered. What it has no room for now waits, in order, and is offered again."""
        if not self._batching:
            return
        raft, now = self._driver.raft, self._clock.monotonic()
        leading = raft.term if raft.role is Role.LEADER else 0
        over = [offer for offer in self._batching if offer.term not in (None, leading)]
        batch = [offer for offer in self._batching if offer.term in (None, leading)] if over else self._batching
        self._batching = []
        self._refuse(over, NotLeaderError("this node's leadership is over"))
        limit = self.options.log_bytes_max
        if limit is not None and self._log.nbytes > limit:
            error = UnavailableError(f"the log has {self._log.nbytes} bytes, more than max_log_size ({limit})")
            self._refuse(batch, error)
            return
        stalled_since, self._stalled_since = self._stalled_since, None
        if not batch:
            return
        try:
            first = self._driver.propose([offer.proposal for offer in batch])
        except NotLeaderError as not_leader:
            self._refuse(batch, not_leader)
        except UnavailableError as full:
            stalled_since = now if stalled_since is None else stalled_since
            if now - stalled_since < self.options.propose_timeout_s:
                # Refusing some and taking what comes after them would leave a gap in somebody's stream.
                self._batching, self._stalled_since = batch, stalled_since
            else:
                self._refuse(batch, full)
        else:
            self._release(batch)
            self._promises.add_writes(first.index, first.term, [offer.future for offer in batch], now)

    def _refuse(self, offers: list[Offer], error: MarbleError) -> None:
        self._release(offers)
        if isinstance(error, NotLeaderError):
            # The core knows ids only; a caller needs to know where to go.
            error = NotLeaderError(str(error), self.leader_endpoint)
        for offer in offers:
            offer.future.set_exception(error)

    def _release(self, offers: list[Offer]) -> None:
        with self._inbox_lock:
            self._inbox_bytes -= sum(offer.proposal.nbytes for offer in offers)

    def _publish(self) -> None:
        """Tell those who wait what the last turn decided."""
        outcome = self._driver.take_outcome()
        for applied in outcome.applied:
            self._promises.applied(applied.first, applied.terms, applied.results)
        self._promises.answered(outcome.reads, self._driver.raft.applied_index)
        for event in outcome.events:
            self._note(event)

    def _note(self, event: RoleChanged) -> None:
        leader = event.leader or "unknown"
        logger.info("node %d is %s in term %d, leader %s", self.options.node_id, event.role.value, event.term, leader)
        with self._view:
            self._role, self._leader = event.role, event.leader
            self._leading_term = event.term if event.role is Role.LEADER else 0
            self._view.notify_all()

    def _abandon(self) -> None:
        """The engine has ended: answer everyone who still waits."""
        while True:
            try:
                # Runs what was posted too late: proposals land in `_batching`; the rest finds its future answered below.
                self._inbox.get_nowait()()
            except queue.Empty:
                break
            except MarbleError:
                continue
        gone = self._gone()
        for _, future, _ in self._batching:
            future.set_exception(gone)
        self._batching = []
        self._promises.abandon(gone)

    def _post(self, action: Callable[[], None], future: Future[Any]) -> None:
        with self._inbox_lock:
            try:
                self._check_running()
            except MarbleError as error:
                future.set_exception(error)
                return
            self._inbox.put(action)

    def _check_running(self) -> None:
        if os.getpid() != self._process:
            raise UsageError("this node was started before a fork and runs in the parent only: open it in one process")
        if self._closing or self.stopped.is_set():
            raise self._gone()

    def _gone(self) -> MarbleError:
        if self.failure is not None:
            return InvariantError(f"node {self.options.node_id} has stopped: {self.failure}")
        return UnavailableError(f"node {self.options.node_id} has stopped")

    def _status(self, raft: Raft) -> dict[str, Any]:
        return {
            "cluster_id": self.options.cluster_id,
            "node_id": self.options.node_id,
            "endpoint": self.options.endpoints[self.options.node_id],
            "role": raft.role.value,
            "term": raft.term,
            "leader_id": raft.leader,
            "leader_endpoint": self.options.endpoints.get(raft.leader),
            "last_index": raft.last_index,
            "persisted_index": raft.persisted_index,
            "commit_index": raft.commit_index,
            "applied_index": raft.applied_index,
            "log_bytes": self._log.nbytes,
            "peers": {
                str(peer): {
                    "match_index": progress.match_index,
                    "next_index": progress.next_index,
                    "state": progress.state.value,
                }
                for peer, progress in sorted(raft.progress.items())
            },
            "nodes": {str(node): endpoint for node, endpoint in sorted(self.options.endpoints.items())},
            "metrics": self.metrics.snapshot(),
        }
