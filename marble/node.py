"""A running node: opens its directory, replays its log, and answers callers for as long as its engine runs.

Rule 1: this is the face of the parts below it. What happens in which order is the drivers', on which thread the engine's.

Life: `Node` (opens the log and the snapshots) -> `start` (replays) -> `stop`. The node ends by itself only when it must not
go on (a failed sync, a broken invariant): then `failure` says why, every waiting caller gets an error, and `stopped` is set.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol, TypeVar

from marble._core.entry_batch import Proposal
from marble.checkpoint import Checkpoints
from marble.config import canonical_endpoint
from marble.desk import Desk
from marble.driver import Driver
from marble.engine import Engine
from marble.env import Clock, Files, Random, SystemClock, SystemRandom
from marble.errors import CorruptionError, UnavailableError, UsageError
from marble.groups import Groups, run_turn
from marble.identity import LOCK_FILE, Acquaintances, bind
from marble.logstore.log import Log, LogOptions
from marble.logstore.snapshots import SnapshotStore
from marble.machine import StateMachine, StoredMachine
from marble.metrics import Metrics
from marble.options import NodeOptions
from marble.pacing import Pacer
from marble.promises import Committed, Lane, Offer, check_proposal, promise
from marble.raft.core import Raft, RaftConfig
from marble.recovery import recover
from marble.snapshotting import SnapshotPolicy
from marble.status import status_of
from marble.transport.codec import Envelope
from marble.types import Change, Members, Role, Transition

logger = logging.getLogger("marble.raft")

GROUP: Final = 0
"""The group of a node that has only one."""
T = TypeVar("T")


class Transport(Protocol):
    """What the node needs of `marble.transport.flight.FlightTransport`."""

    def send(self, to: int, envelopes: list[Envelope]) -> bool: ...
    def set_peers(self, endpoints: Mapping[int, str]) -> None: ...


class Node:
    """One member of a cluster. Thread-safe, except that `start` and `stop` belong to one caller.

    Parameters
    ----------
    options
        Identity, cluster and limits.
    files
        The data directory.
    machines
        What committed entries are applied to; must be empty. One for each group, by the group's number; a single one is
        that of group 0. All nodes of a cluster have the same groups, but for those in `alone`.
    transport
        Carries messages to peers; None for a cluster of one.
    clock, random
        Time and chance; the system's by default.
    metrics, alone
        Where counters go. The groups that this node has for itself: it is their only member.

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
        machines: StateMachine | Mapping[int, StateMachine],
        transport: Transport | None = None,
        *,
        clock: Clock | None = None,
        random: Random | None = None,
        metrics: Metrics | None = None,
        alone: Collection[int] = (),
    ) -> None:
        if options.node_id not in options.endpoints and not options.join:
            raise UsageError(f"node {options.node_id} is not among the cluster's nodes {sorted(options.endpoints)}")
        # The size of a frame stays as it is: a smaller one could not read what an earlier run wrote.
        log_options = LogOptions(options.log_segment_bytes, options.cache_bytes_max)
        if options.entry_bytes_max > log_options.entry_bytes_max:
            raise UsageError(
                f"max_entry_size {options.entry_bytes_max} is above {log_options.entry_bytes_max}, the most that fits the log"
            )
        self.options = options
        self._alone = frozenset(alone)
        self.machines = dict(machines) if isinstance(machines, Mapping) else {GROUP: machines}
        self.metrics = metrics or Metrics()
        self._files = files
        self._transport = transport
        self._clock = clock or SystemClock()
        self._random = random or SystemRandom()
        self._peers: dict[int, str] = {}
        self._resources = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            files.make_directory("")
            stack.enter_context(files.lock(LOCK_FILE))
            voters = () if options.join else tuple(sorted(options.endpoints))
            identity = bind(files, options.cluster_id, options.node_id, voters, self._random)
            genesis = Members(identity.voters)
            self.acquaintances = Acquaintances(files, identity.incarnation, self.metrics)
            """For the transport: which directories this node and the others have."""
            self._log = Log.open(files, log_options)
            stack.callback(self._log.close)
            self._groups = Groups(
                options.node_id,
                self._send,
                options.heartbeat_ticks,
                options.election_ticks,
                self._random.randrange(1, 1 << 62),
                self._log.nbytes,
            )
            self._desks: dict[int, Desk] = {}
            self._engine = Engine(
                options, self._groups, self._desks, self._log, self._clock, self.metrics, self._set_peers
            )
            self._pacer = Pacer(options.snapshot_bytes_per_s, self._pressure, self._engine.closing)
            self._check_log(len(options.endpoints) > 1)
            for group in sorted(self.machines):
                driver = self._recover(group, Members((options.node_id,)) if group in self._alone else genesis)
                self._groups.add(driver)
                self._desks[group] = Desk(
                    options, driver, self._engine.release, lambda: self._log.nbytes, self._now_us, self.metrics
                )
            self._check_log(
                any(len(driver.raft.members.all) != 1 or driver.raft.log.changes for driver in self._groups)
            )
            stores = [driver.snapshots.store for driver in self._groups if driver.snapshots is not None]
            self.checkpoints = Checkpoints(files, self._log, stores)
            self._resources = stack.pop_all()

    # -- what callers see ------------------------------------------------------------------------------------------

    @property
    def machine(self) -> StateMachine:
        """The machine of group 0."""
        return self.machines[GROUP]

    @property
    def role(self) -> Role:
        """This node's role in group 0, as of the engine's last turn."""
        return self._desks[GROUP].role

    @property
    def leading_term(self) -> int:
        """The term in which this node leads group 0, as of the engine's last turn; 0 if it does not lead."""
        return self._desks[GROUP].leading_term

    @property
    def leader_endpoint(self) -> str | None:
        """``host:port`` of the leader of group 0 as far as this node knows."""
        return self._desks[GROUP].leader_endpoint

    @property
    def endpoints(self) -> dict[int, str]:
        """Where the nodes of the cluster are reached, as of the engine's last turn, by their ids."""
        known: dict[int, str] = {}
        for group, desk in self._desks.items():
            known.update({} if group in self._alone else desk.endpoints)
        return dict(sorted(known.items()))

    def members(self, group: int = GROUP) -> Members:
        """Who takes part in `group`, as of the engine's last turn."""
        return self.desk(group).members

    @property
    def is_running(self) -> bool:
        """True between `start` and the engine's end."""
        return self._engine.is_running

    @property
    def failure(self) -> BaseException | None:
        """What made the engine give up, if it did."""
        return self._engine.failure

    @property
    def stopped(self) -> threading.Event:
        """Set when the engine has ended, by `stop` or by a failure."""
        return self._engine.stopped

    def start(self) -> None:
        """Replay what is known to be committed, then start the engine. A cluster of one leads when this returns."""
        if self._engine.started:
            raise UsageError("a node starts once: make a new one")
        run_turn(self._groups, self._log, files=False)
        alone = [driver for driver in self._groups if driver.raft.members.all == (self.options.node_id,)]
        for driver in alone:
            self._groups.use(driver.group).raft.campaign()
        run_turn(self._groups, self._log, files=False)
        for desk in self._desks.values():
            desk.publish()
            self._warn_of_configuration(desk)
        self._set_peers()
        self._engine.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the engine and close the log. Undecided proposals end in OutcomeUnknownError. Idempotent.

        Raises
        ------
        UnavailableError
            If the engine does not end in time (a disk that hangs). The directory then stays locked.
        """
        if self.is_elsewhere:
            return
        self._engine.stop(timeout_s)
        self._resources.close()

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is what a forked child has of its parent's node: nothing that it may stop, or write to the files of."""
        return self._engine.is_elsewhere

    def propose(
        self,
        proposal: Proposal,
        term: int | None = None,
        group: int = GROUP,
        lane: Lane | None = None,
        future: Future[Any] | None = None,
    ) -> Future[Any]:
        """Offer `proposal` for the log; if `term` is given, only under this node's leadership of that term.

        What is offered under one term takes effect in the order in which it was offered, without gaps: after one that was
        refused because the leadership is over, none of it can be accepted any more. What is offered in one `lane` has no
        gaps for any other reason either (a full log). The future, that which is given or a new one, ends with `Committed`, or with
        NotLeaderError or UnavailableError (nothing was replicated), OutcomeUnknownError, or the error that applying it gave everywhere.
        """
        self.desk(group)
        check_proposal(proposal, self.options.entry_bytes_max)
        future = promise(future)
        self._engine.offer(group, Offer(proposal, future, term, lane, self._clock.monotonic()))
        return future

    def decides_alone(self, group: int = GROUP) -> bool:
        """Whether what this node has applied of `group` is all that was ever acknowledged: then a read needs no more than that.

        Raises as `read_index` does if the node has stopped.
        """
        self._engine.check_running()
        return self.desk(group).alone

    def read_index(self, group: int = GROUP, lease: bool = False) -> Future[int]:
        """An index that this node has applied and that makes a read of its tables, from now on, linearizable.

        With `lease`, a leader that has one (`NodeOptions.lease_reads`) asks nobody.

        The future ends with the index, or with UnavailableError (no leader could be asked in time: retry).
        """
        future: Future[int] = promise()
        promises = self.desk(group).promises

        def read() -> None:
            self._groups.use(group)
            promises.add_read(future, self._clock.monotonic(), lease)

        self._engine.post(read, future)
        return future

    def change_membership(
        self,
        changes: Sequence[Change],
        endpoints: Mapping[int, str] | None = None,
        transition: Transition = Transition.AUTO,
        group: int = GROUP,
    ) -> Future[Committed]:
        """Change who takes part, at the leader; by no changes at all, leave a joint group.

        Parameters
        ----------
        changes
            All at once.
        endpoints
            ``host:port`` of nodes that come, by id.
        transition
            See there. The future ends when the entry that enters a joint group is applied, not when that is left.

        The future ends as that of `propose` does. UnavailableError is also the answer while another change is under way.
        """
        future: Future[Committed] = promise()
        desk, places = self.desk(group), dict(endpoints or {})
        if self._transport is not None:
            for endpoint in places.values():
                canonical_endpoint(endpoint)

        def change() -> None:
            self._groups.use(group)
            desk.change_membership(changes, places, transition, future, self._clock.monotonic())

        self._engine.post(change, future)
        return future

    def transfer_leadership(self, to: int, group: int = GROUP) -> Future[None]:
        """Hand the leadership to node `to`; the future ends when that leads.

        Or with NotLeaderError, UsageError (`to` is no voter), or UnavailableError: it did not take over within an election
        timeout.
        """
        future: Future[None] = promise()
        desk = self.desk(group)

        def transfer() -> None:
            self._groups.use(group)
            desk.transfer_leadership(to, future, self._clock.monotonic())

        self._engine.post(transfer, future)
        return future

    def forget_leader(self, group: int = GROUP) -> Future[None]:
        """Be free to vote at once, as a follower that knows better than its timer that its leader is gone."""
        return self.call(lambda raft: raft.forget_leader(), group)

    def snapshot(self, group: int = GROUP) -> Future[int]:
        """Take a snapshot now, and purge the log behind it; the future ends with its index, or with UnavailableError."""
        future: Future[int] = promise()
        desk = self.desk(group)

        def snapshot() -> None:
            self._groups.use(group)
            desk.snapshot(future)

        self._engine.post(snapshot, future)
        return future

    def call(self, function: Callable[[Raft], T], group: int = GROUP) -> Future[T]:
        """Run `function` on the engine thread, between turns."""
        self.desk(group)
        return self._engine.call(lambda: function(self._groups.use(group).raft))

    def campaign(self, group: int = GROUP) -> None:
        """Ask this node to stand for election now (a pre-vote still protects a healthy leader)."""
        self._engine.ask(lambda: self._groups.use(group).raft.campaign())

    def receive(self, envelopes: list[Envelope]) -> None:
        """Take a peer's messages; called by the transport's threads. Full inbox: they are dropped and counted."""
        self._engine.receive(envelopes)

    def unreachable(self, peer: int) -> None:
        """The transport lost the link to `peer`."""
        self._engine.unreachable(peer)

    def way_lost(self, peer: int) -> None:
        """The transport lost one of several ways to `peer`, with entries under way on it."""
        self._engine.way_lost(peer)

    def fail(self, error: BaseException) -> None:
        """Stop the engine because of `error`, which is marble's own: nothing that follows could be trusted."""
        self._engine.fail(error)

    def wait_for_leader(self, timeout_s: float, group: int = GROUP) -> int:
        """Wait until this node knows a leader; return its id. Raises UnavailableError after `timeout_s` seconds."""
        desk = self.desk(group)
        if not desk.wait_for_leader(timeout_s, self.stopped.is_set):
            raise UnavailableError(f"no leader was known to node {self.options.node_id} within {timeout_s} s")
        if self.stopped.is_set():
            raise self._engine.gone()
        return desk.leader

    def status(self, group: int = GROUP) -> dict[str, Any]:
        """A picture of this node, taken between turns: JSON-able. Raises UnavailableError if the engine does not answer."""
        self.desk(group)
        return self._engine.ask(lambda: self._status(self._groups.use(group)))

    def look(self) -> Future[dict[str, Any]]:
        """The same of group 0, for whoever does not wait but sees how long it takes: the engine answers between turns."""
        return self._engine.call(lambda: self._status(self._groups.use(GROUP)))

    def working(self) -> dict[str, float]:
        """For how many seconds each of the threads beside the engine has been at what it does now; 0.0: it does nothing."""
        return self._engine.working()

    def desk(self, group: int = GROUP) -> Desk:
        """Where the callers of `group` stand; its `alone` tells what `decides_alone` does, and less of a node that has ended."""
        desk = self._desks.get(group)
        if desk is None:
            raise UsageError(f"this node has no group {group}, only {sorted(self._desks)}")
        return desk

    # -- opening ---------------------------------------------------------------------------------------------------

    def _check_log(self, has_peers: bool) -> None:
        """Refuse a log that has forgotten what peers rely on."""
        report = self._log.report
        if report.lost_durable_bytes:
            if has_peers:
                raise CorruptionError(
                    f"the log ends {report.lost_durable_bytes} bytes before what this node had told its peers is durable; "
                    "it must not vote with this log",
                    report.cut_path,
                    report.cut_offset,
                )
            logging.getLogger("marble.log").error("%d durable bytes are lost", report.lost_durable_bytes)

    def _recover(self, group: int, genesis: Members) -> Driver:
        options, machine = self.options, self.machines[group]
        store = SnapshotStore(self._files, group)
        recovered = recover(group, self._log.groups.get(group), store, genesis, machine)
        config = RaftConfig(
            id=options.node_id,
            election_ticks=options.election_ticks,
            heartbeat_ticks=options.heartbeat_ticks,
            election_spread_ticks=options.election_spread_ticks,
            pre_vote=options.pre_vote,
            check_quorum=options.check_quorum,
            append_bytes_max=options.append_bytes_max,
            inflight_messages_max=options.inflight_messages_max,
            inflight_bytes_max=options.inflight_bytes_max,
            uncommitted_bytes_max=options.uncommitted_bytes_max,
            priority=options.priority,
            lease_reads=options.lease_reads,
            tick_us=max(1, int(options.tick_ms * 1000)),
            quiesce_ticks=options.quiesce_ticks,
            random=self._random,
        )
        policy = SnapshotPolicy(
            distance=options.snapshot_distance,
            log_bytes=options.log_bytes_kept,
            memory_bytes=options.memory_bytes_max,
            tail=options.purge_tail,
            piece_bytes_max=min(options.snapshot_piece_bytes, options.append_bytes_max),
            patience_ticks=options.election_ticks,
            window_bytes_max=options.snapshot_window_bytes_max,
        )
        return Driver(
            group,
            Raft(config, recovered.state),
            self._log,
            machine,
            self._groups.post,
            store=store,
            policy=policy,
            configured=options.endpoints,
            replicated=recovered.endpoints,
            wall_us=self._clock.wall_us,
            pace=self._pacer,
            scrub_ticks=round(options.scrub_interval_s * 1000 / options.tick_ms),
        )

    def _warn_of_configuration(self, desk: Desk) -> None:
        """Say so if the configuration names other nodes than those that take part: it does not change who they are."""
        configured, members = sorted(self.options.endpoints), list(desk.members.all)
        if not self.options.join and configured != members and desk.driver.group not in self._alone:
            logger.warning(
                "the configuration names the nodes %s, but the members of group %d are %s: members are added and removed "
                "by the leader (`marble members`), not by a configuration",
                configured,
                desk.driver.group,
                members,
            )

    # -- for the parts below -----------------------------------------------------------------------------------------

    def _now_us(self) -> int:
        return int(self._clock.monotonic() * 1_000_000)

    def _send(self, to: int, envelopes: list[Envelope]) -> bool:
        return self._transport is not None and self._transport.send(to, envelopes)

    def _set_peers(self) -> None:
        """Tell the transport whom to talk to, if that is news."""
        peers: dict[int, str] = {}
        for driver in self._groups:
            peers.update(driver.peers)
        peers.pop(self.options.node_id, None)
        if peers == self._peers or self._transport is None:
            return
        self._peers = peers
        try:
            self._transport.set_peers(peers)
        except UsageError:
            # What was replicated was looked at before; this is for what an older leader let through.
            logger.exception("node %d cannot talk to all of %s", self.options.node_id, peers)

    def _pressure(self) -> float:
        """What lags behind of the tables' files, as a part of what may before writers are refused."""
        stored = [machine for machine in self.machines.values() if isinstance(machine, StoredMachine)]
        return max((machine.backlog_bytes for machine in stored), default=0) / self.options.backlog_bytes_max

    def _status(self, driver: Driver) -> dict[str, Any]:
        return status_of(driver, self.options, self._log.nbytes, self._clock.wall_us(), self.metrics)
