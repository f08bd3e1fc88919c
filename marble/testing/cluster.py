"""A whole cluster in one thread, on virtual time: the production core, driver, log and tables on a simulated network, disks and clocks.

Rule 1: a history is what a plan and a seed make it, to the byte. Nothing here reads a clock, starts a thread, or draws chance that is not
        seeded.
Rule 2: a history has three parts: faults and load for a number of steps; then all faults end, and within a bound the cluster must have done
        all that was asked of it, and have begun with it soon (progress); then the clients' history is checked (linearizability), and
        the replicas must agree.

After each event the invariants that it may have broken are checked: see `marble.testing.invariants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from marble.errors import MarbleError
from marble.testing.backups import Backups
from marble.testing.bulk import Bulk
from marble.testing.clients import Client, Sales
from marble.testing.history import History, check
from marble.testing.ledger import Ledger, Violation
from marble.testing.linearize import Answer
from marble.testing.loop import SECOND, Loop
from marble.testing.model import Model
from marble.testing.network import Network
from marble.testing.node import SimulatedNode
from marble.testing.operator import Operator
from marble.testing.plan import Plan, TableFiles, plan_for
from marble.testing.world import World
from marble.transport.codec import Envelope
from marble.types import Role

STEPS: Final = 10_000
"""How many events the faulty part of a history has, unless somebody says otherwise."""

HISTORY_STATES_MAX: Final = 200_000
"""Configurations that the history checker may look at for one key."""


@dataclass(slots=True)
class Report:
    """What one history came to."""

    seed: int
    plan: str
    steps: int = 0
    simulated_us: int = 0
    injected: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0
    lost: int = 0
    reads: int = 0
    elections: int = 0
    committed: int = 0
    undecided: int = 0
    """Histories whose check gave up."""
    back_us: int = 0
    """From the end of all faults until each group has committed something anew."""
    level_us: int = 0
    """And until each of its members has applied something of that."""


class Simulation:
    """One history of one cluster.

    Parameters
    ----------
    plan, seed
        What happens.
    record
        Keep the whole transcript instead of its end.
    """

    def __init__(self, plan: Plan, seed: int, *, record: bool = False) -> None:
        self.seed = seed
        self.plan = plan
        self.loop = Loop(seed, record=record)
        self.world = World(self.loop, plan)
        for group in range(plan.groups):
            self.world.ledgers[group] = Ledger(group, clock_us=lambda node: self.nodes[node].clock.monotonic_us())
            self.world.cores[group] = {}
            if plan.tables is not None:
                self.world.models[group] = Model()
        voters = range(1, plan.nodes + 1)
        self.network = Network(self.loop, plan.network, self._deliver, self._tell, self.world.injected)
        self.world.send = self.network.send
        self.nodes = {number: SimulatedNode(self.world, number, voters) for number in voters}
        self.sales = Sales(History(), {})
        self.clients = [
            Client(self.world, number, self.nodes, self.sales) for number in range(1, plan.load.clients + 1)
        ]
        self.operator = Operator(self.world, self.nodes)
        self._back_us = self._level_us = 0
        for node in self.nodes.values():
            self.loop.after(self.loop.between(0, 50_000), node.start)
        for client in self.clients:
            client.start()
        self.bulk = Bulk(self.world, self.nodes)
        self.backups = Backups(self.world)
        self._plan_faults()

    # -- what goes wrong ---------------------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        plan = self.plan
        tables = plan.tables or TableFiles()
        faults: Sequence[tuple[float, Callable[[], None]]] = (
            (plan.network.cuts, lambda: self.network.cut(list(self.nodes), self._leaders())),
            (plan.network.lags, lambda: self.network.lag(list(self.nodes), self._leaders())),
            (plan.process.blackouts, self._blackout),
            (plan.operations.changes, self.operator.change),
            (plan.operations.transfers, self._transfer),
            (plan.operations.wipes * plan.nodes, self._at_some_node(self.operator.wipe)),
            *(
                (rate, self._at_some_node(action))
                for rate, action in (
                    (plan.process.crashes * plan.nodes, self._crash),
                    (plan.process.kills * plan.nodes, self._kill),
                    (plan.process.elections * plan.nodes, self._election),
                    (plan.clocks.pauses * plan.nodes, self._pause),
                    (plan.clocks.jumps * plan.nodes, self._jump),
                    (plan.disk.failed_syncs * plan.nodes, self._fail_sync),
                    (plan.disk.full * plan.nodes, self._fill),
                    (plan.disk.flips * plan.nodes, self._flip),
                    (tables.flips * plan.nodes, lambda node: self._harm(node, lose=False)),
                    (tables.losses * plan.nodes, lambda node: self._harm(node, lose=True)),
                    (tables.read_errors * plan.nodes, self._fail_read),
                    (tables.backups, self.backups.take),
                )
            ),
        )
        for rate, action in faults:
            if rate > 0:
                self._again(rate, action, first=True)

    def _again(self, rate: float, action: Callable[[], None], first: bool = False) -> None:
        """Let `action` happen `rate` times a second on average, until the faults end."""
        if self.world.plan is not self.plan:
            return
        if not first:
            action()
        self.loop.after(int(self.loop.random.expovariate(rate) * SECOND) + 1, self._again, rate, action)

    def _at_some_node(self, action: Callable[[SimulatedNode], None]) -> Callable[[], None]:
        def act() -> None:
            numbers = self._leaders() or [node.id for node in self.nodes.values() if node.alive]
            if numbers:
                action(self.nodes[numbers[int(self.loop.random.random() * len(numbers))]])

        return act

    def _leaders(self) -> list[int]:
        """Those who take themselves for leaders, whether or not they still are, if the plan wants them hit now; else nobody."""
        if not self.loop.chance(self.plan.at_leaders):
            return []
        cores = self.world.cores[self.loop.between(0, self.plan.groups - 1)]
        return sorted(number for number, core in cores.items() if core.role is Role.LEADER)

    def _down(self, node: SimulatedNode, longest: int) -> None:
        self.loop.after(self.loop.between(0, longest), node.start)

    def _crash(self, node: SimulatedNode) -> None:
        """Now, or in the middle of whatever the node does to its disk next."""
        self.world.injected["power losses"] += 1
        if self.loop.chance(0.4):
            node.crash()
            self._down(node, self.plan.process.down_us)
        else:
            node.files.lose_power_at = node.files.operations + self.loop.between(1, 6)

    def _kill(self, node: SimulatedNode) -> None:
        self.world.injected["kills"] += 1
        node.kill()
        self._down(node, self.plan.process.down_us)

    def _blackout(self) -> None:
        self.world.injected["blackouts"] += 1
        for node in self.nodes.values():
            if node.alive:
                node.crash()
                self._down(node, self.plan.process.down_us)

    def _election(self, node: SimulatedNode) -> None:
        self.world.injected["elections out of turn"] += 1
        force = self.loop.chance(0.5)
        node.act(self.loop.between(0, self.plan.groups - 1), lambda driver: driver.raft.campaign(force))

    def _transfer(self) -> None:
        self.operator.transfer(self.loop.between(0, self.plan.groups - 1))

    def _pause(self, node: SimulatedNode) -> None:
        self.world.injected["pauses"] += 1
        self.loop.note(node.id, "stands still")
        node.pause(self.loop.now + self.loop.between(1000, self.plan.clocks.pause_us))

    def _jump(self, node: SimulatedNode) -> None:
        self.world.injected["clock jumps"] += 1
        node.clock.jump(self.loop.between(-3600 * SECOND, 3600 * SECOND))

    def _fail_sync(self, node: SimulatedNode) -> None:
        self.world.injected["failed disk operations"] += 1
        node.files.fail_at = node.files.operations + self.loop.between(1, 3)

    def _fill(self, node: SimulatedNode) -> None:
        self.world.injected["full disks"] += 1
        self.loop.note(node.id, "has a full disk")
        node.files.full = True
        self.loop.after(self.loop.between(0, 5 * SECOND), self._empty, node)

    def _empty(self, node: SimulatedNode) -> None:
        node.files.full = False

    def _flip(self, node: SimulatedNode) -> None:
        """Damage one log, if the cluster can do without that node."""
        if self.operator.can_lose(node) and node.flip_a_bit():
            self.world.injected["flipped bits"] += 1

    def _harm(self, node: SimulatedNode, lose: bool) -> None:
        """Damage one file of a table, or take it away, if no other node lacks anything."""
        if not self.operator.can_lose(node) or any(
            each.tables.is_harmed(each.seats) for each in self.nodes.values() if each is not node
        ):
            return
        if node.tables.harm(node.seats, lose):
            self.world.injected["lost files" if lose else "damaged files"] += 1

    def _fail_read(self, node: SimulatedNode) -> None:
        self.world.injected["failed reads"] += 1
        node.files.fail_read_at = node.files.reads + self.loop.between(1, 20)

    # -- what happens ------------------------------------------------------------------------------------------------

    def _deliver(self, to: int, envelopes: Sequence[Envelope]) -> None:
        self.nodes[to].receive(envelopes)

    def _tell(self, sender: int, to: int, another: bool) -> None:
        """A stream of `sender` to another node broke; it may have another way."""
        node = self.nodes[sender]
        for group in list(node.seats):
            if another:
                node.act(group, lambda driver: driver.raft.report_way_lost(to))
            else:
                node.act(group, lambda driver: driver.raft.report_unreachable(to))

    def run(self, steps: int = STEPS) -> Report:
        """Play the whole history.

        Raises
        ------
        Violation
            A property does not hold. The error's notes say how to repeat it, and end with the transcript.
        """
        try:
            while self.loop.steps < steps:
                self.loop.step()
            self.heal()
            return self.check()
        except (MarbleError, AssertionError, LookupError, TypeError, ValueError) as error:
            error.add_note(f"plan {self.plan.name}, seed {self.seed}, step {self.loop.steps}")
            error.add_note("\n".join(self.loop.transcript()))
            raise

    def heal(self) -> None:
        """End all faults and demand progress: every client gets an answer, and all replicas have applied the same."""
        loop, world = self.loop, self.world
        loop.note(0, "all faults end")
        world.plan = self.plan.healed()
        self.network.faults = world.plan.network
        self.network.heal()
        for node in self.nodes.values():
            node.files.lose_power_at = node.files.fail_at = node.files.fail_read_at = None
            node.files.full = False
            node.resume()
            node.start()
        self.operator.settle()
        for client in self.clients:
            client.finish()
        begun = loop.now
        before = {group: len(ledger.committed) for group, ledger in world.ledgers.items()}
        while loop.now < begun + self.plan.heal_us:
            for _ in range(64):
                loop.step()
                self._note_progress(begun, before)
            self._check_progress(loop.now - begun)
            if self._is_done():
                return
        raise Violation(
            f"no progress within {self.plan.heal_us / SECOND:g} s after all faults ended: {self._what_lacks()}"
        )

    def _note_progress(self, begun: int, before: Mapping[int, int]) -> None:
        """Keep when all that was committed in each group `before` was left behind: by somebody, by all its members."""
        if not self._back_us:
            if all(len(self.world.ledgers[group].committed) > index for group, index in before.items()):
                self._back_us = self.loop.now - begun
        elif not self._level_us and all(
            number in self.world.cores[group] and self.world.cores[group][number].applied_index > index
            for group, index in before.items()
            for number in self.operator.members(group).all
        ):
            self._level_us = self.loop.now - begun

    def _check_progress(self, since: int) -> None:
        """Something that is proposed anywhere is committed soon, and soon everybody has it: no cluster disturbs itself."""
        bound = self.plan.back_timeouts
        late = since > bound * self.plan.election_ticks * self.plan.tick_us
        if bound and late and not self._level_us:
            what = "applied by all members" if self._back_us else "committed"
            raise Violation(
                f"nothing was {what} within {bound} election timeouts after all faults ended: {self._what_lacks()}"
            )

    def _is_done(self) -> bool:
        if any(client.operation is not None for client in self.clients) or not all(
            client.finished for client in self.clients
        ):
            return False
        return all(self._agree(group, ledger) for group, ledger in self.world.ledgers.items())

    def _agree(self, group: int, ledger: Ledger) -> bool:
        """Whether all members are well and have applied everything."""
        members = self.operator.members(group)
        if members.joint or not members.voters:
            return False
        for number in members.all:
            node = self.nodes[number]
            if node.broken is not None:
                return False
            core = self.world.cores[group].get(number)
            if core is None or core.applied_index != len(ledger.committed) or core.members != members:
                return False
            if not node.tables.is_well(node.seats[group]):
                return False
        return True

    def _what_lacks(self) -> str:
        waiting = [client.number for client in self.clients if client.operation is not None]
        cores = [
            f"node {node}: {core.role.value} of term {core.term}, applied {core.applied_index} of {core.last_index}"
            for cores in self.world.cores.values()
            for node, core in cores.items()
        ]
        return f"clients {waiting} wait; {'; '.join(cores)}"

    # -- what must hold at the end -----------------------------------------------------------------------------------

    def check(self) -> Report:
        """Replicas agree, nothing is there that nobody wrote, and one order explains all that the clients were told."""
        for group in self.world.ledgers:
            self._check_replicas(group)
        verdict = check(self.sales.history, explored_max=HISTORY_STATES_MAX)
        if verdict.answer is Answer.VIOLATED:
            raise Violation(str(verdict))
        report = Report(self.seed, self.plan.name)
        report.steps, report.simulated_us = self.loop.steps, self.loop.now
        report.injected = dict(self.world.injected)
        report.acknowledged, report.lost = self.sales.acknowledged, self.sales.lost
        report.back_us, report.level_us = self._back_us, self._level_us
        report.undecided = int(verdict.answer is Answer.UNDECIDED)
        for ledger in self.world.ledgers.values():
            report.reads += ledger.reads_answered
            report.elections += len(ledger.leaders)
            report.committed += len(ledger.committed)
        return report

    def _check_replicas(self, group: int) -> None:
        """All replicas that have applied the same entries hold the same rows (state machine safety, Raft §5.4.3)."""
        tables = self.sales.tables
        if group not in tables:
            return
        pictures = {
            number: _rows(self.nodes[number].seats[group].machine.read(tables[group]))
            for number in self.operator.members(group).all
        }
        first = min(pictures)
        for node, rows in pictures.items():
            if rows != pictures[first]:
                raise Violation(f"group {group}: nodes {first} and {node} hold different rows")


def _rows(view: Any) -> list[dict[str, int]]:
    rows: list[dict[str, int]] = view.scan(None, None).read_all().to_pylist()
    return rows


def simulate(plan: str | Plan, seed: int, steps: int = STEPS, *, nodes: int = 0) -> Report:
    """Play one history; see `Simulation.run`.

    Parameters
    ----------
    plan
        A plan, or the name of one.
    seed
        Draws all that the plan leaves open.
    steps
        How many events its faulty part has.
    nodes
        How many voters, if not as many as the plan says.
    """
    chosen = plan_for(plan, seed, nodes) if isinstance(plan, str) else plan
    return Simulation(chosen, seed).run(steps)
