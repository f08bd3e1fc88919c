"""What goes wrong in a history, how often, and how much is done meanwhile.

Rule 1: a plan is a value. All chance that is left is in the seed, so a plan's name and a seed are a history's whole description.

Rates are per simulated second: of a node, if the fault is a node's, else of the cluster. Chances are per message or per act. Durations are
microseconds, and drawn evenly up to the number that stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Any, Final

from marble.errors import UsageError

MILLISECOND: Final = 1000


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """Between nodes. A cut may be one-way, may hit some links only, and may flap."""

    delay_us: int = 2 * MILLISECOND
    slow: float = 0.01
    """Chance that a packet takes up to `slow_us` and so is overtaken by later ones."""
    slow_us: int = 400 * MILLISECOND
    loss: float = 0.01
    duplication: float = 0.01
    split: float = 0.1
    """Chance that the messages of one packet travel each on its own."""
    cuts: float = 0.15
    cut_us: int = 8_000 * MILLISECOND
    lags: float = 0.03
    """What one node is sent, or what it sends, comes up to `lag_us` late for a while; then, perhaps, what it sends is lost."""
    lag_us: int = 2_000 * MILLISECOND
    flap: float = 0.2
    """Chance that a cut opens and closes all the time while it lasts."""
    ways: str = "any"
    """Cuts are "both" ways, "one" way, or "any" of these."""
    partial: float = 0.3
    """Chance that a cut takes only some of the links around those whom it hits."""
    told: float = 0.3
    """Chance that who sent a packet that is lost hears of it, as of a stream that breaks: half the time that there is another way."""


@dataclass(frozen=True, slots=True)
class DiskFaults:
    """Of a node's disk. A failed sync and a full disk stop the node; a flipped bit must be found before it is believed."""

    sync_us: int = 3 * MILLISECOND
    slow: float = 0.01
    """Chance that a sync takes up to `slow_us`."""
    slow_us: int = 2_000 * MILLISECOND
    failed_syncs: float = 0.0
    full: float = 0.0
    flips: float = 0.0


@dataclass(frozen=True, slots=True)
class ClockFaults:
    """Of a node's clock, and of the process as a whole."""

    drift: float = 0.01
    """The rate of a node's monotonic clock is wrong by up to this."""
    jumps: float = 0.02
    """Wall clocks jump by up to an hour, in either direction."""
    pauses: float = 0.02
    pause_us: int = 4_000 * MILLISECOND
    """A paused process does nothing and takes nothing in; then everything at once."""


@dataclass(frozen=True, slots=True)
class ProcessFaults:
    """Crashes lose power, now or in the middle of what the disk does next; kills leave the disk as the kernel sees it."""

    crashes: float = 0.05
    kills: float = 0.03
    down_us: int = 4_000 * MILLISECOND
    blackouts: float = 0.004
    """All nodes lose power at once."""
    elections: float = 0.02
    """A node stands for election out of turn."""


@dataclass(frozen=True, slots=True)
class Operations:
    """What the operator does, for the whole cluster."""

    changes: float = 0.0
    """Changes of the membership, of any size and kind."""
    transfers: float = 0.03
    wipes: float = 0.0
    """Disks that are lost with all that is on them, where the others can do without."""


@dataclass(frozen=True, slots=True)
class Load:
    """What clients do. Each waits for an answer, or gives up, before it goes on."""

    clients: int = 4
    think_us: int = 300 * MILLISECOND
    timeout_us: int = 3_000 * MILLISECOND
    keys: int = 4
    reads: float = 0.4
    deletes: float = 0.1
    exact: float = 0.6
    """How many of the clients have sessions, and send again what was not answered."""
    loss: float = 0.01
    """Chance that a request, or its answer, gets lost between client and node."""
    stray: float = 0.3
    """Chance that a client asks any node rather than the one that it takes for the leader."""


@dataclass(frozen=True, slots=True)
class TableFiles:
    """Tables in files, with more in them, and what happens to the files. What is lost of them others must have."""

    load: float = 12.0
    """Writes a second beside the clients', of up to a dozen rows, without anybody waiting for them."""
    keys: int = 150
    flips: float = 0.0
    losses: float = 0.0
    """A file is gone."""
    read_errors: float = 0.0
    """One of the next reads of the disk fails; the one after it does not."""
    inline_bytes: int = -1
    """A table with less in memory goes into the snapshot and into no file."""
    retention: int = 0
    """For so many entries back the past is kept, and looked at."""
    backups: float = 0.0
    """Backups that are begun, while everything goes on; see `marble.testing.backups`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One mix of faults, load and configuration.

    - ``nodes`` is how many voters a history begins with, ``groups`` how many Raft groups they share.
    - ``seconds_max`` bounds the faulty part of a history in simulated time; ``heal_us`` is how long the healed cluster may take until
      all that was asked of it is done.
    """

    name: str = "mixed"
    nodes: int = 3
    groups: int = 1
    network: NetworkFaults = field(default_factory=NetworkFaults)
    disk: DiskFaults = field(default_factory=DiskFaults)
    clocks: ClockFaults = field(default_factory=ClockFaults)
    process: ProcessFaults = field(default_factory=ProcessFaults)
    operations: Operations = field(default_factory=Operations)
    load: Load = field(default_factory=Load)
    tables: TableFiles | None = None
    """None: tables are in memory, and in snapshots."""
    tick_us: int = 100 * MILLISECOND
    election_ticks: int = 10
    heartbeat_ticks: int = 2
    election_spread_ticks: int = 0
    """0: the core's own. Most histories have that: who waits for different times does more that differs."""
    snapshot_distance: int = 40
    """Tiny, so that snapshots are taken, sent and purged behind all the time."""
    snapshot_tail: int = 15
    lease_reads: bool = False
    clock_drift_allowed: float = 0.01
    quiesce_ticks: int = 0
    priorities: bool = False
    pre_vote: bool = True
    check_quorum: bool = True
    one_by_one: float = 0.3
    """Chance that a node sends entries one to a message, so that a message may carry old terms only (Raft figure 8)."""
    at_leaders: float = 0.5
    """Chance that a fault hits one that takes itself for a leader, rather than anybody: that is where most of a history is made."""
    heal_us: int = 60_000 * MILLISECOND
    back_timeouts: int = 0
    """Within so many election timeouts of the end of all faults each group commits something anew, and all its members apply it.
    0: that is not demanded.
    """

    def healed(self) -> Plan:
        """The same cluster and clients without any fault."""
        return replace(
            self,
            network=NetworkFaults(
                delay_us=self.network.delay_us, slow=0, loss=0, duplication=0, split=0, cuts=0, lags=0
            ),
            disk=DiskFaults(sync_us=self.disk.sync_us, slow=0),
            clocks=ClockFaults(drift=self.clocks.drift, jumps=0, pauses=0),
            process=ProcessFaults(crashes=0, kills=0, blackouts=0, elections=0),
            operations=Operations(transfers=0),
            load=replace(self.load, loss=0, stray=0),
            tables=None if self.tables is None else replace(self.tables, load=0, flips=0, losses=0, read_errors=0),
        )


_CALM = Plan().healed()

PLANS: Final[dict[str, Plan]] = {
    plan.name: plan
    for plan in (
        replace(_CALM, name="calm"),
        Plan("mixed"),
        replace(_CALM, name="crashes", process=ProcessFaults(0.15, 0.1, 2_000_000, 0.03, 0.02)),
        replace(_CALM, name="network", network=NetworkFaults(30_000, 0.1, 2_000_000, 0.1, 0.1, 0.3, 0.05)),
        replace(_CALM, name="partitions", network=NetworkFaults(cuts=0.4, flap=0.3), load=Load(reads=0.5, stray=0.5)),
        replace(
            _CALM,
            name="disk",
            disk=DiskFaults(30_000, 0.1, 5_000_000, failed_syncs=0.03, full=0.03, flips=0.01),
            process=ProcessFaults(0.1, 0.05, 2_000_000, elections=0.1),
        ),
        replace(
            _CALM,
            name="clocks",
            clocks=ClockFaults(0.01, jumps=0.2, pauses=0.2, pause_us=5_000_000),
            load=Load(reads=0.6, stray=0.5),
        ),
        # Leaders come and go before they have replicated what they took in: where old terms are committed wrongly, if they are.
        replace(
            _CALM,
            name="elections",
            network=NetworkFaults(60_000, 0.05, 1_500_000, 0.05, split=0.5, cuts=0.5, cut_us=3_000_000),
            process=ProcessFaults(0.05, 0.05, 1_500_000, elections=0.3),
            load=Load(clients=6, think_us=100_000, timeout_us=1_500_000, reads=0.2),
            pre_vote=False,
            one_by_one=0.8,
        ),
        # Leaders are cut off for long and go on taking writes, while several others come and go: logs that differ at more than their end.
        replace(
            _CALM,
            name="islands",
            network=NetworkFaults(20_000, 0.02, 1_000_000, cuts=0.4, cut_us=15_000_000, flap=0.1),
            disk=DiskFaults(sync_us=20_000, slow=0.1, slow_us=2_500_000),
            process=ProcessFaults(0.03, 0.05, 1_500_000, 0.01, elections=0.4),
            operations=Operations(transfers=0.2),
            load=Load(clients=8, think_us=50_000, timeout_us=1_000_000, reads=0.2, stray=0.5),
            check_quorum=False,
            snapshot_distance=100,
            one_by_one=0.6,
        ),
        # Nodes come and go, the leader among them, on a network and disks that fail.
        replace(
            _CALM,
            name="members",
            network=NetworkFaults(cuts=0.1, cut_us=4_000_000),
            process=ProcessFaults(0.05, 0.05, 2_000_000, elections=0.1),
            operations=Operations(changes=0.7, transfers=0.05, wipes=0.05),
            load=Load(think_us=150_000),
        ),
        # The lead is handed over and reads rest on leases, while processes stand still and groups fall asleep.
        replace(
            _CALM,
            name="leases",
            network=NetworkFaults(20_000, 0.05, 1_500_000, cuts=0.2, cut_us=3_000_000, lags=0.3),
            process=ProcessFaults(0.05, 0.1, 500_000, elections=0.1),
            clocks=ClockFaults(0.01, jumps=0.05, pauses=0.1, pause_us=2_000_000),
            operations=Operations(transfers=0.8),
            load=Load(clients=8, think_us=40_000, timeout_us=1_500_000, keys=2, reads=0.7, stray=0.6),
            lease_reads=True,
            quiesce_ticks=15,
        ),
        # Everybody reads everywhere, on a slow network, while the lead changes hands and nobody tells a leader that it is over.
        replace(
            _CALM,
            name="reads",
            network=NetworkFaults(80_000, 0.1, 2_500_000, cuts=0.3, cut_us=6_000_000),
            process=ProcessFaults(0.05, 0.2, 500_000, elections=0.3),
            load=Load(clients=8, think_us=30_000, timeout_us=1_000_000, keys=2, reads=0.8, deletes=0.0, stray=0.8),
            check_quorum=False,
        ),
        # Tables in files, and all that may befall a disk between two of its operations.
        replace(
            _CALM,
            name="files",
            network=NetworkFaults(cuts=0.1, cut_us=4_000_000),
            disk=DiskFaults(10_000, 0.05, 1_000_000, failed_syncs=0.03, full=0.03),
            process=ProcessFaults(0.12, 0.06, 2_000_000, 0.01, elections=0.05),
            tables=TableFiles(read_errors=0.02, retention=8),
            snapshot_distance=20,
        ),
        # Files that are damaged or gone, at one node at a time: found before they are believed, and fetched from a peer that has them.
        replace(
            _CALM,
            name="damage",
            process=ProcessFaults(0.04, 0.04, 2_000_000, elections=0.05),
            tables=TableFiles(flips=0.3, losses=0.1, read_errors=0.02),
        ),
        # Nodes fall far behind, lose their disks, and are sent what they lack; tables are partly in files, partly in snapshots.
        replace(
            _CALM,
            name="catching-up",
            network=NetworkFaults(cuts=0.3, cut_us=10_000_000, lags=0.1),
            process=ProcessFaults(0.1, 0.05, 6_000_000, elections=0.1),
            operations=Operations(changes=0.3, transfers=0.1, wipes=0.03),
            tables=TableFiles(flips=0.1, losses=0.03, inline_bytes=1500),
            snapshot_distance=25,
            snapshot_tail=0,
        ),
        # Files are damaged while others need them: what a leader offers is not to be had, and only it can mend that.
        replace(
            _CALM,
            name="unfetchable",
            network=NetworkFaults(cuts=0.3, cut_us=8_000_000, lags=0.1),
            process=ProcessFaults(0.1, 0.05, 6_000_000, elections=0.1),
            tables=TableFiles(flips=1.5, losses=0.3),
            snapshot_distance=25,
            snapshot_tail=0,
        ),
        # Backups of nodes that purge, compact and crash, and what is restored from them.
        replace(
            _CALM,
            name="backups",
            network=NetworkFaults(cuts=0.1, cut_us=4_000_000),
            process=ProcessFaults(0.05, 0.03, 2_000_000, elections=0.05),
            tables=TableFiles(flips=0.02, read_errors=0.02, inline_bytes=600, backups=0.7),
            snapshot_distance=20,
            groups=2,
        ),
    )
}
"""The mixes that have a name. ``swarm`` and ``swarm-files`` are not among them: see `plan_for`."""

_ONE: Final = replace(_CALM, back_timeouts=2, election_spread_ticks=5)
"""Of one kind of fault, with the election timeouts of real nodes: an election that begins when the fault ends takes at most one and a
half, if no vote is split."""

_CUT: Final = NetworkFaults(loss=0, duplication=0, cuts=0.4, ways="both", partial=0.0, flap=0.0, lags=0)
_BARE: Final = replace(_CUT, cuts=0, slow=0)

SCENARIOS: Final[dict[str, Plan]] = {
    plan.name: plan
    for plan in (
        replace(_ONE, name="partition", network=_CUT),
        replace(_ONE, name="one-way", network=replace(_CUT, ways="one")),
        replace(_ONE, name="partial-partition", network=replace(_CUT, partial=1.0)),
        # So many cuts at once that for most of the time nobody hears a majority.
        replace(_ONE, name="no-majority", network=replace(_CUT, cuts=2.0, cut_us=5_000 * MILLISECOND), at_leaders=0.0),
        replace(_ONE, name="loss", network=replace(_BARE, loss=0.3)),
        replace(_ONE, name="delay", network=replace(_BARE, delay_us=100 * MILLISECOND)),
        # A connection that breaks takes with it what is on the way.
        replace(_ONE, name="resets", network=replace(_CUT, cuts=2.0, cut_us=50 * MILLISECOND)),
        # What arrives is whole, since checksums cover it: a flipped bit is a packet that does not arrive, and ends its stream.
        replace(_ONE, name="flipped-bits", network=replace(_CUT, loss=0.02, cuts=0.5, cut_us=20 * MILLISECOND)),
        # It takes nothing in and says nothing, while its kernel takes what it is sent; then it goes on where it stood.
        replace(_ONE, name="stopped", clocks=ClockFaults(jumps=0, pauses=0.15, pause_us=6_000 * MILLISECOND)),
        replace(_ONE, name="silent-peer", clocks=ClockFaults(jumps=0, pauses=0.15, pause_us=60_000 * MILLISECOND)),
        replace(_ONE, name="slow-disk", disk=DiskFaults(slow=0.5, slow_us=1_000 * MILLISECOND)),
        # A disk that is full stops its node, and somebody starts it again when there is room.
        replace(_ONE, name="full-disk", disk=DiskFaults(slow=0, full=0.1)),
    )
}
"""What `tests/process` does to real processes, under the same names: one kind of fault each. No part of ``all``, nor of a swarm."""


SWARM: Final = "swarm"
SWARM_FILES: Final = "swarm-files"
_IN_MEMORY: Final = [name for name, plan in PLANS.items() if plan.tables is None]


def plan_for(name: str, seed: int, nodes: int = 0) -> Plan:
    """The plan of this name; for ``swarm``, one that `seed` draws, for ``swarm-files`` also one, with tables in files.

    A swarm's plans leave most faults out and turn the others up, each in its own way: what is never off hides what it hides
    ("Swarm Testing", ISSTA'12).

    Raises
    ------
    UsageError
        If no plan has this name.
    """
    if name == SWARM:
        plan = _drawn(Random(f"plan {seed}"))
    elif name == SWARM_FILES:
        plan = _with_files(Random(f"plan {seed}"))
    elif name in PLANS or name in SCENARIOS:
        plan = PLANS[name] if name in PLANS else SCENARIOS[name]
    else:
        known = ", ".join((SWARM, SWARM_FILES, *PLANS, *SCENARIOS))
        raise UsageError(f"there is no plan {name!r}: choose one of {known}")
    return replace(plan, nodes=nodes) if nodes else plan


def _drawn(random: Random) -> Plan:
    base = PLANS[random.choice([*_IN_MEMORY[1:], "elections", "islands", "members"])]
    other = PLANS[random.choice(sorted(_IN_MEMORY))]
    parts: dict[str, Any] = {
        part: _turned(getattr(random.choice((base, other)), part), random)
        for part in ("network", "disk", "clocks", "process", "operations")
    }
    # The drift is what leases are allowed to count on: no plan goes beyond it.
    parts["clocks"] = replace(parts["clocks"], drift=random.choice((0.0, 0.01)))
    return replace(
        base,
        name=SWARM,
        nodes=random.choice((1, 2, 3, 3, 3, 3, 4, 5, 5, 5)),
        groups=random.choice((1, 1, 1, 3)),
        load=replace(
            base.load,
            clients=random.choice((2, 4, 8)),
            keys=random.choice((1, 3, 8)),
            stray=random.choice((0.0, 0.3, 1.0)),
        ),
        pre_vote=random.random() < 0.8,
        check_quorum=base.lease_reads or random.random() < 0.8,
        lease_reads=base.lease_reads,
        quiesce_ticks=random.choice((0, 0, 15)),
        priorities=random.random() < 0.3,
        snapshot_distance=random.choice((20, 40, 1000)),
        snapshot_tail=random.choice((0, 5, 15)),
        one_by_one=random.choice((0.0, 0.3, 1.0)),
        **parts,
    )


def _with_files(random: Random) -> Plan:
    plan = _drawn(random)
    tables = TableFiles(
        load=random.choice((6.0, 12.0, 25.0)),
        keys=random.choice((40, 150, 600)),
        flips=random.choice((0.0, 0.0, 0.2)),
        losses=random.choice((0.0, 0.0, 0.1)),
        read_errors=random.choice((0.0, 0.0, 0.05)),
        inline_bytes=random.choice((-1, -1, 800, 3000)),
        retention=random.choice((0, 0, 10)),
    )
    return replace(plan, name=SWARM_FILES, snapshot_distance=random.choice((12, 25, 60)), tables=tables)


def _turned(faults: Any, random: Random) -> Any:
    """`faults`, some of them off and some of them stronger."""
    changed = {}
    for each in fields(faults):
        value = getattr(faults, each.name)
        if isinstance(value, float):
            changed[each.name] = min(0.5, value * random.choice((0.0, 0.5, 1.0, 1.0, 3.0)))
    return replace(faults, **changed)
