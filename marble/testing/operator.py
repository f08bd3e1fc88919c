"""The operator of the simulated cluster: adds, promotes, demotes and removes nodes, hands the lead over, replaces what is broken.

Rule 1: whatever the operator asks for may be refused, and an answer is not waited for: it looks at a leader, asks, and looks again later.
Rule 2: it never takes a cluster below what can go on. It touches nothing else while a member is broken, and breaks no disk
        unless the others can do without it. A node that lost its disk never comes back under its old number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from marble.driver import Driver
from marble.errors import NotLeaderError, UnavailableError, UsageError
from marble.raft.core import Raft
from marble.testing.node import SimulatedNode
from marble.testing.world import World
from marble.types import Change, ChangeKind, Members, Role, Transition

VOTERS_MAX: Final = 5
NODES_MAX: Final = 12
"""In one history, those included that are gone."""


class Operator:
    """See the head of this module.

    Parameters
    ----------
    nodes
        All nodes, by number. New ones are added here.
    """

    def __init__(self, world: World, nodes: dict[int, SimulatedNode]) -> None:
        self._world = world
        self._loop = world.loop
        self._nodes = nodes

    # -- what it looks at --------------------------------------------------------------------------------------------

    def members(self, group: int) -> Members:
        """Who takes part: what the node says that has applied most. All that run must be asked, since nobody else knows."""
        cores = self._world.cores[group].values()
        best = max(cores, key=lambda core: (core.applied_index, core.id), default=None)
        return Members() if best is None else best.members

    def settled(self, group: int) -> bool:
        """Whether no change of the membership is under way, nor could be: all members run and agree."""
        members = self.members(group)
        cores = self._world.cores[group]
        if members.joint or not members.voters:
            return False
        for node in members.all:
            core = cores.get(node)
            if (
                core is None
                or core.members != members
                or (core.log.changes and core.log.changes[-1] > core.applied_index)
            ):
                return False
        return True

    def broken(self, group: int) -> list[int]:
        """Members that will never run again, or may not."""
        return [number for number in self.members(group).all if self._is_broken(number)]

    def can_lose(self, node: SimulatedNode) -> bool:
        """Whether every group goes on without `node`, for good."""
        if any(self._is_broken(number) for group in self._world.ledgers for number in self.members(group).all):
            return False
        for group in self._world.ledgers:
            if not self.settled(group) or self.members(group).voters in ((node.id,), ()):
                return False
            voters = self.members(group).voters
            if node.id in voters and (len(voters) - 1) * 2 <= len(voters):
                return False
        return True

    def _is_broken(self, number: int) -> bool:
        node = self._nodes[number]
        return node.broken is not None or node.damaged

    def _leader(self, group: int) -> tuple[SimulatedNode, Raft] | None:
        cores = self._world.cores[group]
        leading = [core for _, core in sorted(cores.items()) if core.role is Role.LEADER]
        return None if not leading else (self._nodes[leading[-1].id], leading[-1])

    # -- what it does ------------------------------------------------------------------------------------------------

    def change(self) -> None:
        """Change the membership of some group in some way, or mend it."""
        group = self._loop.between(0, len(self._world.ledgers) - 1)
        found = self._leader(group)
        if found is None:
            return
        node, core = found
        members = core.members
        if members.joint:
            if not members.auto_leave:
                self._propose(node, group, [], Transition.AUTO)
            return
        changes = self._repairs(group, members) or self._draw(members)
        transition = self._loop.random.choice((Transition.AUTO, Transition.AUTO, Transition.JOINT, Transition.EXPLICIT))
        if changes:
            self._propose(node, group, changes, transition)

    def settle(self) -> None:
        """The faults are over: leave joint groups, and replace what is broken, until that is done."""
        for group in self._world.ledgers:
            found = self._leader(group)
            if found is None:
                continue
            node, core = found
            if core.members.joint:
                if not core.members.auto_leave:
                    self._propose(node, group, [], Transition.AUTO)
            elif changes := self._repairs(group, core.members):
                self._propose(node, group, changes, Transition.AUTO)
        self._loop.after(500_000, self.settle)

    def transfer(self, group: int) -> None:
        """Hand the lead of `group` to another voter, or to nobody in particular."""
        found = self._leader(group)
        if found is None:
            return
        node, core = found
        voters = core.members.voters
        target = voters[self._loop.between(0, len(voters) - 1)] if voters else core.id
        self._world.injected["transfers"] += 1
        self._loop.note(node.id, "is to hand the lead of group {} to {}", group, target)
        self._ask(node, group, lambda driver: driver.raft.transfer_leadership(target))

    def wipe(self, node: SimulatedNode) -> None:
        """Take a node's disk away, if the others can do without it."""
        if self.can_lose(node):
            self._world.injected["wiped disks"] += 1
            node.retire("its disk is gone")

    def _repairs(self, group: int, members: Members) -> list[Change]:
        """Replace each broken member by a new node, in one step."""
        changes: list[Change] = []
        for number in members.all:
            if self._is_broken(number):
                kind = ChangeKind.ADD_VOTER if number in members.voters else ChangeKind.ADD_LEARNER
                changes.append(Change(ChangeKind.REMOVE, number))
                if new := self._newcomer(group):
                    changes.append(Change(kind, new))
        return changes

    def _draw(self, members: Members) -> list[Change]:
        """Something between one small step and another membership altogether."""
        loop = self._loop
        voters, learners = list(members.voters), list(members.learners)
        changes: dict[int, Change] = {}
        for _ in range(loop.random.choice((1, 1, 1, 2, 3))):
            draw = loop.random.random()
            if draw < 0.35 and len(voters) < VOTERS_MAX:
                number = self._outsider(members, changes)
                if number:
                    kind = ChangeKind.ADD_VOTER if loop.chance(0.5) else ChangeKind.ADD_LEARNER
                    changes[number] = Change(kind, number)
                    voters += [number] * (kind is ChangeKind.ADD_VOTER)
            elif draw < 0.5 and learners:
                number = learners.pop()
                if number not in changes and len(voters) < VOTERS_MAX:
                    changes[number] = Change(ChangeKind.ADD_VOTER, number)
                    voters.append(number)
            elif draw < 0.6 and len(voters) > 2:
                number = voters[loop.between(0, len(voters) - 1)]
                if number not in changes:
                    changes[number] = Change(ChangeKind.ADD_LEARNER, number)
                    voters.remove(number)
            elif len(voters) > 2 or learners:
                pool = voters + learners if len(voters) > 2 else learners
                number = pool[loop.between(0, len(pool) - 1)]
                if number not in changes:
                    changes[number] = Change(ChangeKind.REMOVE, number)
                    (voters if number in voters else learners).remove(number)
        return list(changes.values())

    def _outsider(self, members: Members, changes: dict[int, Change]) -> int:
        """A node that is not in the group: one that was once, or a new one; 0 if there are too many already."""
        idle = [
            number
            for number, node in self._nodes.items()
            if number not in members.all and number not in changes and node.broken is None and not node.damaged
        ]
        if idle and self._loop.chance(0.6):
            return idle[self._loop.between(0, len(idle) - 1)]
        return self._new_node()

    def _newcomer(self, group: int) -> int:
        """A node for the place of a broken one: preferably one that runs and has nothing to do here."""
        members = self.members(group).all
        for number, node in self._nodes.items():
            if number not in members and node.broken is None and not node.damaged and number > self._world.plan.nodes:
                return number
        return self._new_node()

    def _new_node(self) -> int:
        if len(self._nodes) >= NODES_MAX:
            return 0
        number = max(self._nodes) + 1
        self._world.injected["new nodes"] += 1
        self._nodes[number] = node = SimulatedNode(self._world, number, ())
        node.start()
        return number

    def _propose(self, node: SimulatedNode, group: int, changes: list[Change], transition: Transition) -> None:
        self._world.injected["membership changes asked for"] += 1
        self._loop.note(node.id, "is asked for {} in group {}, {}", changes, group, transition)
        endpoints = {change.node: f"node:{change.node}" for change in changes if change.kind is not ChangeKind.REMOVE}
        self._ask(node, group, lambda driver: driver.propose_membership(changes, endpoints, transition))

    def _ask(self, node: SimulatedNode, group: int, action: Callable[[Driver], object]) -> None:
        def ask(driver: Driver) -> None:
            try:
                action(driver)
            except (NotLeaderError, UnavailableError, UsageError) as error:
                self._loop.note(node.id, "refuses: {}", error)

        node.act(group, ask)
