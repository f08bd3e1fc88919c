"""Power lost, the disk failing or full, at every single operation of flush, compaction, snapshot and removal.

The log is a list that loses nothing: whoever comes back replays it from the newest snapshot, as a node does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsm.shelf import GROUP, Shelf
from lsm.test_machine import NOOP, create, delete, drop, proposal, steps, write
from lsm.test_snapshot import everything

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.env import SystemRandom
from marble.lsm.machine import TableMachine
from marble.testing.disk import DiskCrash, SimulatedFiles

LOG = (
    NOOP,
    create("x"),
    write((1, "a"), (2, "b" * 600), (3, "c")),
    create("y"),
    write((1, "A"), (4, "d" * 700)),
    delete(2),
    write((7, "y"), table=2),
    write((2, "B"), (5, "e" * 900)),
    delete(1, 3, 9),
    drop("y"),
    create("z"),
    write((1, "z"), (2, "zz"), table=3),
    write((6, "f" * 800), (4, "D")),
    delete(1, table=3),
    NOOP,
    write((8, "g"), (9, "h" * 500)),
)

Step = Callable[["Life"], None]


class Life:
    """One process after the other, on one disk, with one log."""

    def __init__(self, files: SimulatedFiles, log: tuple[Proposal, ...]) -> None:
        self.files = files
        self.log = log
        self.end = 0
        """So many entries have been applied by whoever came farthest."""
        self.taken = 0
        """Where the last snapshot stands that was reported as taken."""
        self.shelf = self.opened()

    def opened(self) -> Shelf:
        shelf = Shelf(self.files)
        assert shelf.machine.applied_index >= self.taken, "a snapshot was lost that had been taken"
        self.shelf = shelf
        self.apply(self.end)
        return shelf

    def apply(self, end: int) -> None:
        first = self.shelf.machine.applied_index
        if end > first:
            self.shelf.machine.apply(entry_batch.build(1, first + 1, 1, list(self.log[first:end])))
        self.end = max(self.end, end)

    def check(self) -> None:
        """Content as if nothing had happened, and no file too many."""
        twin = TableMachine()
        if self.end:
            twin.apply(entry_batch.build(1, 1, 1, list(self.log[: self.end])))
        assert everything(self.shelf.machine) == everything(twin)
        kept = self.shelf.snapshots.kept()
        assert {name[9:-6] for name in self.shelf.names()} == kept


def entries(count: int) -> Step:
    return lambda life: life.apply(life.end + count)


def snapshot(life: Life) -> None:
    life.shelf.snapshot()
    life.taken = life.shelf.machine.applied_index


def compact(life: Life) -> None:
    life.shelf.compact(1)


def held(life: Life) -> None:
    """A compaction is planned, a snapshot goes between, and only then it is carried out."""
    task = life.shelf.machine.plan_compaction()
    snapshot(life)
    if task is not None:
        task.run()


SCRIPT: tuple[Step, ...] = (
    entries(3),
    snapshot,
    entries(2),
    # Two in quick succession (etcd#18055).
    snapshot,
    entries(1),
    snapshot,
    compact,
    entries(2),
    snapshot,
    compact,
    compact,
    entries(2),
    held,
    entries(2),
    snapshot,
    compact,
    entries(2),
    held,
    compact,
    entries(1),
    snapshot,
    entries(1),
    compact,
    snapshot,
)


def run(life: Life, script: tuple[Step, ...]) -> None:
    for step in script:
        step(life)


def test_the_script_does_what_it_is_for() -> None:
    life = Life(SimulatedFiles(SystemRandom(0)), LOG)
    seen: set[str] = set()
    for step in SCRIPT:
        before = set(life.shelf.names())
        step(life)
        seen |= {f"{len(levels)} levels" for levels in [life.shelf.levels()]}
        seen |= {"files came"} if set(life.shelf.names()) - before else set()
        seen |= {"files went"} if before - set(life.shelf.names()) else set()
    assert seen >= {"1 levels", "2 levels", "files came", "files went"}
    assert life.end == len(LOG)
    assert life.files.operations > 120
    life.shelf.machine.collect(life.shelf.snapshots.kept)
    life.check()


OPERATIONS = 400
"""More than the script has."""


@pytest.mark.parametrize("seed", range(2))
def test_power_lost_at_every_operation(seed: int) -> None:
    for operation in range(1, OPERATIONS):
        files = SimulatedFiles(SystemRandom(1000 * seed + operation))
        life: Life | None = None
        files.lose_power_at = operation
        try:
            life = Life(files, LOG)
            run(life, SCRIPT)
            break
        except DiskCrash:
            files.crash()
        if life is None:
            life = Life(files, LOG)
        life.opened()
        life.check()
        # What it has shown it keeps.
        files.crash()
        life.opened()
        life.check()
    assert 120 < operation < OPERATIONS - 1


def test_the_disk_fails_at_every_operation() -> None:
    """What fails is given up and tried again; a process that was told of it may also be restarted."""
    for operation in range(1, OPERATIONS):
        files = SimulatedFiles(SystemRandom(operation))
        life = Life(files, LOG)
        start = files.operations
        files.fail_at = start + operation
        failed = False
        for step in SCRIPT:
            try:
                step(life)
            except OSError:
                failed = True
                files.fail_at = None
                step(life)
        if not failed:
            break
        life.shelf.machine.collect(life.shelf.snapshots.kept)
        life.check()
        files.crash()
        life.opened()
        life.check()
    assert 120 < operation < OPERATIONS - 1


def test_a_disk_that_stays_full_only_stops_what_needs_it() -> None:
    for full_from in range(len(SCRIPT)):
        life = Life(SimulatedFiles(SystemRandom(full_from)), LOG)
        for number, step in enumerate(SCRIPT):
            life.files.full = number >= full_from
            with contextlib.suppress(OSError):
                step(life)
        assert not [name for name in life.files.list("tables") if name.endswith(".tmp")]
        life.files.full = False
        snapshot(life)
        life.check()
        life.opened()
        life.check()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("entries"), st.integers(1, 5)),
        st.tuples(st.sampled_from(["snapshot", "compact", "held", "reopen", "crash"]), st.integers(0, 60)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, min_size=1, max_size=60), ACTIONS, st.integers(0, 1000))
def test_any_life_with_crashes_anywhere(history: list[Any], actions: list[tuple[str, int]], seed: int) -> None:
    files = SimulatedFiles(SystemRandom(seed))
    life = Life(files, tuple(proposal(*step) for step in history))
    for action, number in actions:
        try:
            if action == "entries":
                life.apply(min(len(history), life.end + number))
            elif action == "crash":
                files.lose_power_at = files.operations + number
            elif action == "reopen":
                life.opened()
            elif life.end:
                {"snapshot": snapshot, "compact": compact, "held": held}[action](life)
        except DiskCrash:
            files.crash()
            life.opened()
            life.check()
    files.crash()
    life.opened()
    life.check()


def test_leftovers_of_others_stay() -> None:
    files = SimulatedFiles(SystemRandom(0))
    other = f"tables/{GROUP + 1:08x}-{'0' * 32}.arrow"
    files.put(other, b"")
    run(Life(files, LOG), SCRIPT)
    assert files.exists(other)
