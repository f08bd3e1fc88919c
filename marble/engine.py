"""The engine of a node: one thread that owns the drivers, a bounded inbox before it, and workers beside it.

Rule 1: everything that touches a driver or a core happens on the engine thread. Other threads (callers, Flight handlers)
post to the inbox and wait on futures; readers of tables need no thread of ours at all.
Rule 2: neither a slow disk nor a large batch keeps the engine from hearing its peers: syncs of the log, the machines' work
and files of snapshots are jobs of a `Worker` each. One sync is under way at a time, and what begins meanwhile shares the next.
Rule 3: what fails on any of these threads ends the engine, and with it the node: `failure` says why, every waiting caller
gets an error, and `stopped` is set.

Threads: ``marble-engine-N`` (this class), ``marble-log-N`` (syncs), ``marble-apply-N`` (the machines' writing side),
``marble-snapshot-N`` (files of snapshots), ``marble-compact-N`` (the machines' files), each with the number of the node.
`Engine.stop` ends them all.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from marble.desk import Desk
from marble.env import Clock
from marble.errors import InvariantError, MarbleError, NotLeaderError, ProtocolError, UnavailableError, UsageError
from marble.groups import Groups, Write
from marble.jobs import ApplyJob, CompactJob, FileJob, MachineJob, ScrubJob, WriteJob
from marble.logs import fields
from marble.logstore.log import Log
from marble.metrics import Metrics
from marble.options import NodeOptions
from marble.promises import Offer, promise
from marble.transport.codec import Envelope
from marble.workers import Worker

logger = logging.getLogger("marble.node")
_files_log = logging.getLogger("marble.lsm")
_messages_log = logging.getLogger("marble.transport")

QUICK_APPLY_BYTES_MAX: Final = 256 * 1024
"""More than this is never applied on the engine's own thread."""

T = TypeVar("T")


class NodeStoppedError(InvariantError):
    """The engine had ended by itself when the call came, or before it was taken: nothing was replicated."""


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: nothing that the copies say of their nodes is true any more."""
    for engine in _engines:
        engine.withdraw()


os.register_at_fork(after_in_child=_leave_to_parent)


class SyncJob:
    """One sync of the log, for all writes that had begun before it; with `purge`, what is superfluous goes."""

    def __init__(self, log: Log, writes: list[Write], purge: bool) -> None:
        self.writes = writes
        self._log = log
        self._purge = purge

    def run(self) -> None:
        """Raises InvariantError if the disk fails: the node must then stop."""
        self._log.sync()
        if self._purge:
            self._log.purge()


class Engine:
    """The running part of a node. `start` and `stop` belong to one caller; the rest is thread-safe.

    Parameters
    ----------
    options
        Limits and timing.
    groups, desks
        The drivers, and for each group's number the desk of its callers. The engine thread's from `start` on.
    log
        What to sync.
    clock
        Time.
    metrics
        Where counters go.
    peers_changed
        Called on the engine thread when other nodes are to be talked to, or elsewhere.
    """

    def __init__(
        self,
        options: NodeOptions,
        groups: Groups,
        desks: Mapping[int, Desk],
        log: Log,
        clock: Clock,
        metrics: Metrics,
        peers_changed: Callable[[], None],
    ) -> None:
        self.failure: BaseException | None = None
        self.stopped = threading.Event()
        self.closing = threading.Event()
        """Set when `stop` was called."""
        self._options = options
        self._groups = groups
        self._desks = desks
        self._log = log
        self._clock = clock
        self._metrics = metrics
        self._peers_changed = peers_changed
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._inbox_lock = threading.Lock()
        self._inbox_bytes = 0
        self._offering: set[int] = set()
        self._unsynced: list[Write] = []
        self._purge = False
        self._started = False
        self._process = os.getpid()
        _engines.add(self)
        name = options.node_id
        seconds = {
            SyncJob: metrics.histogram("log_sync_seconds"),
            ApplyJob: metrics.histogram("apply_seconds"),
            WriteJob: metrics.histogram("flush_seconds"),
            CompactJob: metrics.histogram("compaction_seconds"),
        }
        self._entries_applied = metrics.counter("entries_applied")
        self._bytes_applied = metrics.counter("bytes_applied")
        post = self._inbox.put
        self._syncer: Worker[SyncJob] = Worker(f"marble-log-{name}", post, self._synced, clock, seconds)
        self._applier: Worker[MachineJob] = Worker(f"marble-apply-{name}", post, self._applied, clock, seconds)
        self._filer: Worker[FileJob] = Worker(f"marble-snapshot-{name}", post, groups.finish_snapshot, clock, seconds)
        self._compacter: Worker[CompactJob] = Worker(f"marble-compact-{name}", post, self._compacted, clock, seconds)
        self._threads = [
            threading.Thread(target=self._run, name=f"marble-engine-{name}", daemon=True),
            self._syncer.thread,
            self._applier.thread,
            self._filer.thread,
            self._compacter.thread,
        ]

    # -- any thread --------------------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether `start` was called. A node starts once."""
        return self._started

    @property
    def is_running(self) -> bool:
        """True between `start` and the engine's end."""
        return self._started and not self.stopped.is_set()

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a copy in a forked child: the threads, the files and the locks are the parent's."""
        return os.getpid() != self._process

    def withdraw(self) -> None:
        """No desk may say any more that it knows all, since nobody keeps it up to date."""
        for desk in self._desks.values():
            desk.alone = False

    def start(self) -> None:
        """Start the threads."""
        self._started = True
        own = self._options.node_id
        logger.info("node %d of cluster %s starts", own, self._options.cluster_id, extra=fields(node=own))
        for thread in reversed(self._threads):
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the threads. Undecided proposals end in OutcomeUnknownError. Idempotent.

        Raises
        ------
        UnavailableError
            If one of them does not end in time (a disk that hangs).
        """
        first = not self.closing.is_set()
        self.closing.set()
        if self._started:
            self._inbox.put(lambda: None)
            deadline = time.monotonic() + timeout_s
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    what = "engine" if thread is self._threads[0] else f"thread {thread.name}"
                    raise UnavailableError(
                        f"the {what} of node {self._options.node_id} did not end within {timeout_s} s"
                    )
            if first:
                logger.info("node %d has stopped", self._options.node_id, extra=fields(node=self._options.node_id))
        self.stopped.set()

    def working(self) -> dict[str, float]:
        """See `marble.node.Node.working`."""
        return {
            "log": self._syncer.busy_s,
            "apply": self._applier.busy_s,
            "snapshot": self._filer.busy_s,
            "compact": self._compacter.busy_s,
        }

    def offer(self, group: int, offer: Offer) -> None:
        """Have `offer` proposed. Raises UnavailableError if too much waits already."""
        size = offer.proposal.nbytes
        with self._inbox_lock:
            self.check_running()
            if self._inbox_bytes and self._inbox_bytes + size > self._options.inbox_bytes_max:
                self._metrics.counter("proposals_refused").add(1)
                raise UnavailableError(
                    "too many proposals wait on this node: retry later, or keep fewer writes in flight"
                )
            self._inbox_bytes += size
            self._inbox.put(lambda: self._offer(group, offer))

    def release(self, nbytes: int) -> None:
        """So many bytes of what was offered wait no longer."""
        with self._inbox_lock:
            self._inbox_bytes -= nbytes

    def post(self, action: Callable[[], None], future: Future[Any]) -> None:
        """Have `action` run on the engine thread between turns; `future` hears of it if that cannot be."""
        with self._inbox_lock:
            try:
                self.check_running()
            except MarbleError as error:
                future.set_exception(error)
                return
            self._inbox.put(action)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the engine thread, between turns."""
        future: Future[T] = promise()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
                # What is neither the caller's fault nor a matter of time is ours: the engine must not go on.
                if not (isinstance(error, UsageError | NotLeaderError | UnavailableError) or self.stopped.is_set()):
                    raise

        self.post(run, future)
        return future

    def ask(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine thread and wait. Raises UnavailableError if the engine does not answer."""
        try:
            return self.call(function).result(self._options.read_timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"the engine of node {self._options.node_id} does not answer (a slow disk?)"
            ) from None

    def receive(self, envelopes: list[Envelope]) -> None:
        """Take a peer's messages; called by the transport's threads. Full inbox: they are dropped and counted."""
        if self.stopped.is_set():
            return
        if self._inbox.qsize() >= self._options.inbox_messages_max:
            self._metrics.counter("messages_dropped_inbox_full").add(len(envelopes))
            return
        self._inbox.put(lambda: self._receive(envelopes))

    def unreachable(self, peer: int) -> None:
        """The transport lost the link to `peer`."""
        self._inbox.put(lambda: self._groups.report_unreachable(peer))

    def way_lost(self, peer: int) -> None:
        """The transport lost one of several ways to `peer`, with entries under way on it."""
        self._inbox.put(lambda: self._groups.report_way_lost(peer))

    def fail(self, error: BaseException) -> None:
        """Stop because of `error`, which is marble's own: nothing that follows could be trusted."""

        def stop() -> None:
            if not self.stopped.is_set():  # Else the engine has ended already and is answering who still waits.
                raise error

        self._inbox.put(stop)

    def gone(self) -> MarbleError:
        """Why this engine answers nothing any more."""
        if self.failure is not None:
            return NodeStoppedError(f"node {self._options.node_id} has stopped: {self.failure}")
        return UnavailableError(f"node {self._options.node_id} has stopped")

    def check_running(self) -> None:
        """Raise what `gone` gives if this engine has ended, UsageError in a process that was forked off."""
        if os.getpid() != self._process:
            raise UsageError("this node was started before a fork and runs in the parent only: open it in one process")
        if self.closing.is_set() or self.stopped.is_set():
            raise self.gone()

    # -- the engine thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self.failure = error
            logger.exception(
                "the engine of node %d stops", self._options.node_id, extra=fields(node=self._options.node_id)
            )
        finally:
            self._syncer.end()
            self._applier.end()
            self._filer.end()
            self._compacter.end()
            self.withdraw()
            with self._inbox_lock:
                self.stopped.set()
            self._abandon()

    def _loop(self) -> None:
        tick_s = self._options.tick_ms / 1000
        next_tick = self._clock.monotonic() + tick_s
        for group in self._desks:
            self._groups.use(group)  # The replay may have left a snapshot to be written.
        while not self.closing.is_set():
            try:
                self._inbox.get(timeout=max(0.0, next_tick - self._clock.monotonic()))()
                # What has gathered meanwhile shares this turn and its sync. The count bounds a turn under a flood.
                for _ in range(self._inbox.qsize()):
                    self._inbox.get_nowait()()
            except queue.Empty:
                pass
            now = self._clock.monotonic()
            if self._offering:
                self._propose(now)
            if now >= next_tick:
                # Ticks are never closer than this: leases rest on it. Nor does a process that was paused make up for lost
                # ones: its peers' answers still wait in the inbox.
                next_tick = now + tick_s
                self._groups.tick(int(now * 1_000_000))
                self._purge |= self._log.room.rests(now)
                for group, desk in self._desks.items():
                    if desk.tick(now):
                        self._groups.use(group)
            self._turn()

    def _turn(self) -> None:
        """Carry out everything that can be carried out now, and tell those who wait."""
        busy = True
        while busy:
            busy, writes = self._groups.begin()
            self._unsynced += writes
            self._purge |= self._groups.take_purged()
            if (self._unsynced or self._purge) and self._syncer.outstanding == 0:
                busy |= self._sync()
            for job in self._groups.take_applies():
                if self._applier.quick and job.nbytes <= QUICK_APPLY_BYTES_MAX:
                    self._applier.run_here(job)
                    busy = True
                else:
                    self._applier.put(job)
        for file_job in self._groups.take_snapshots():
            self._filer.put(file_job)
        for compact_job in self._groups.take_compactions():
            self._compacter.put(compact_job)
        members_changed = False
        for driver in self._groups.end_turn():
            outcome = self._desks[driver.group].publish()
            members_changed |= outcome.members_changed
            if outcome.refused:
                self._metrics.counter("messages_refused").add(outcome.refused)
        if members_changed:
            self._peers_changed()

    def _sync(self) -> bool:
        """Begin a sync. Returns whether it is done already."""
        job = SyncJob(self._log, self._unsynced, self._purge)
        here = self._syncer.quick and self._inbox.empty() and not self._purge
        self._unsynced, self._purge = [], False
        if here:
            self._syncer.run_here(job)
        else:
            self._syncer.put(job)
        return here

    def _synced(self, job: SyncJob) -> None:
        self._groups.persisted(job.writes)

    def _applied(self, job: MachineJob) -> None:
        if isinstance(job, ApplyJob) and job.applied is not None:
            self._entries_applied.add(len(job.applied.results))
            self._bytes_applied.add(job.applied_bytes)
        self._groups.finish_apply(job)

    def _compacted(self, job: CompactJob) -> None:
        self._groups.finish_compaction(job)
        if isinstance(job, ScrubJob):
            self._metrics.counter("files_scrubbed").add(bool(job.name))
            if job.damage is not None:
                self._metrics.counter("files_found_damaged").add()
                own = self._options.node_id
                _files_log.warning("node %d fetches a file anew: %s", own, job.damage, extra=fields(node=own))
        if job.error is not None and not self.closing.is_set():
            self._metrics.counter("compactions_failed").add(1)
            _files_log.warning(
                "node %d could not compact files: %s",
                self._options.node_id,
                job.error,
                extra=fields(node=self._options.node_id),
            )

    def _offer(self, group: int, offer: Offer) -> None:
        self._desks[group].offer(offer)
        self._offering.add(group)

    def _propose(self, now: float) -> None:
        for group in sorted(self._offering):
            self._groups.use(group)
            if not self._desks[group].propose(now):
                self._offering.discard(group)

    def _receive(self, envelopes: list[Envelope]) -> None:
        for envelope in envelopes:
            try:
                if not self._groups.receive(envelope):
                    self._metrics.counter("messages_misdirected").add(1)
            except ProtocolError as error:
                # A peer's fault, and it changed nothing here.
                self._metrics.counter("messages_refused").add(1)
                _messages_log.warning(
                    "node %d drops a message: %s",
                    self._options.node_id,
                    error,
                    extra=fields(node=self._options.node_id),
                )

    def _abandon(self) -> None:
        """The engine has ended: answer everyone who still waits."""
        while True:
            try:
                # Runs what was posted too late: proposals land at their desk; the rest finds its future answered below.
                self._inbox.get_nowait()()
            except queue.Empty:
                break
            except MarbleError:
                continue
        gone = self.gone()
        for desk in self._desks.values():
            desk.abandon(gone)
