"""Power lost, or the disk failing, at every single operation; and long random lives against a model.

The model is `logstore.model`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logstore.model import Contents, Group, Model, Step, append, group_contents, purge, start_after, sync
from logstore.support import SEGMENT, SMALL, disk, entries, reopened

from marble.env import SystemRandom
from marble.errors import InvariantError
from marble.logstore.log import Log
from marble.logstore.segment import SYNCED_PATH, segment_numbers
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.types import HardState

SCRIPT: tuple[Step, ...] = (
    append(1, HardState(1, 1, 0), entries(1, [1, 1], size=64)),
    append(2, HardState(1, 2, 0), None),
    sync,
    append(1, HardState(1, 1, 2), entries(3, [1] * 4, size=700)),
    append(2, None, entries(1, [1], group=2)),
    sync,
    append(1, HardState(2, 0, 2), entries(4, [2], size=900, mark=1)),
    sync,
    append(1, None, entries(5, [2] * 3, size=1500, mark=2)),
    sync,
    append(1, HardState(3, 3, 5), entries(6, [3, 3], size=64, mark=3)),
    append(2, HardState(4, 1, 1), entries(2, [4, 4], group=2)),
    sync,
)

ONE = tuple(HardState(1, 1, commit) for commit in range(100))

PURGING: tuple[Step, ...] = (
    append(1, ONE[0], entries(1, [1] * 4, size=900)),
    append(2, HardState(1, 2, 1), entries(1, [1, 1], group=2)),
    sync,
    append(1, ONE[4], entries(5, [1] * 4, size=900)),
    sync,
    append(1, ONE[8], entries(9, [1] * 4, size=900)),
    append(3, HardState(7, 3, 0), None),
    sync,
    # Two snapshots in quick succession, each purged at once, as far as group 2 allows (etcd#18055).
    start_after(1, 6, 1),
    purge,
    sync,
    purge,
    start_after(1, 8, 1),
    start_after(2, 2, 1),
    append(1, None, entries(13, [1], size=900)),
    sync,
    purge,
    purge,
    # A snapshot of another node's takes the place of everything, of group 2's beyond its end.
    append(1, HardState(2, 0, 8), entries(12, [2, 2], mark=1)),
    start_after(2, 50, 4, HardState(5, 3, 50)),
    start_after(1, 13, 2),
    append(2, None, entries(51, [4, 5], group=2, size=3000)),
    sync,
    purge,
    append(1, HardState(2, 2, 13), entries(14, [2] * 3, size=2000)),
    sync,
    start_after(1, 15, 9),
    append(1, HardState(9, 2, 15), entries(16, [9], size=4000)),
    start_after(2, 52, 5),
    sync,
    purge,
)


def run(files: SimulatedFiles, model: Model, script: tuple[Step, ...]) -> None:
    """Live until the end of `script` or until the power goes or the disk fails."""
    with contextlib.suppress(DiskCrash, InvariantError):
        log = Log.open(files, SMALL)
        for step in script:
            step(log, model)
        log.close()


def operations_of(script: tuple[Step, ...]) -> int:
    files, model = disk(), Model()
    run(files, model, script)
    numbers = segment_numbers(files)
    assert len(numbers) >= 2 if script is SCRIPT else numbers[0] >= 4
    assert model.allows(groups_of(files)), "the script came to its end"
    return files.operations


def groups_of(files: SimulatedFiles, *, writable: bool = False) -> Contents:
    log = Log.open(files, SMALL, writable)
    try:
        return group_contents(log)
    finally:
        log.close()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("script", [SCRIPT, PURGING], ids=["writing", "purging"])
def test_power_lost_at_every_operation(script: tuple[Step, ...], seed: int) -> None:
    for operation in range(1, operations_of(script) + 1):
        files, model = disk(1000 * seed + operation), Model()
        files.lose_power_at = operation
        run(files, model, script)
        files.crash()
        log = Log.open(files, SMALL)
        assert log.report.lost_durable_bytes == 0
        found = group_contents(log)
        assert model.allows(found), f"operation {operation}"
        # What it has shown it keeps, and it can go on from there.
        files.crash()
        assert files.exists(SYNCED_PATH), "verify calls a log without it damaged"
        assert groups_of(files, writable=True) == found
        log = Log.open(files, SMALL)
        log.append(9, HardState(1, 1, 0), entries(1, [1], group=9))
        log.sync()
        files.crash()
        after = groups_of(files)
        assert after.pop(9).hard_state == HardState(1, 1, 0)
        assert after == found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("script", [SCRIPT, PURGING], ids=["writing", "purging"])
def test_power_lost_again_at_every_operation_of_the_recovery(script: tuple[Step, ...], seed: int) -> None:
    for operation in range(1, operations_of(script) + 1, 3):
        for second in range(1, 12):
            files, model = disk(1000 * seed + operation), Model()
            files.lose_power_at = operation
            run(files, model, script)
            files.crash()
            shown: Contents | None = None
            files.lose_power_at = files.operations + second
            with contextlib.suppress(DiskCrash):
                shown = groups_of(files, writable=True)
            files.crash()
            found = groups_of(files, writable=True)
            assert model.allows(found)
            assert shown is None or found == shown


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kill_first", [False, True])
@pytest.mark.parametrize("script", [SCRIPT, PURGING], ids=["writing", "purging"])
def test_disk_fails_at_every_operation(script: tuple[Step, ...], seed: int, kill_first: bool) -> None:
    """After a failed sync data may look sound and be nowhere: what a restarted process shows must be on the disk."""
    for operation in range(1, operations_of(script) + 1):
        files, model = disk(1000 * seed + operation), Model()
        files.fail_at = operation
        run(files, model, script)
        shown = None
        if kill_first:
            shown = groups_of(files, writable=True)
            assert model.allows(shown)
        files.crash()
        found = groups_of(files, writable=True)
        assert model.allows(found)
        assert shown is None or found == shown, f"operation {operation}"


def test_failed_sync_leaves_data_that_looks_sound() -> None:
    """The scenario by hand, so that the simulated disk is known to lie the way that real ones do."""
    files = disk()
    log = Log.open(files)
    log.append(1, None, entries(1, [1]))
    log.sync()
    files.fail_at = files.operations + 2
    log.append(1, None, entries(2, [1]))
    with pytest.raises(InvariantError):
        log.sync()
    assert len(reopened(files)[1][1]) == 2, "a reader sees both"
    naive = files.copy()
    naive.open_append(SEGMENT(1)).sync()
    naive.crash()
    assert len(reopened(naive)[1][1]) == 1, "the next sync returned, and the data is gone"
    assert len(reopened(files, writable=True)[1][1]) == 2
    files.crash()
    assert len(reopened(files)[1][1]) == 2


ACTIONS = ["entries", "entries", "replace", "state", "start", "install", "purge", "sync", "sync"]
ACTIONS += ["reopen", "kill", "power", "fail"]


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    action = st.tuples(
        st.sampled_from(ACTIONS),
        st.integers(1, 3),
        st.integers(0, 6),
        st.sampled_from([0, 64, 640, 3000]),
    )
    return draw(st.lists(action, min_size=1, max_size=60))


class Life:
    """One log over many lives beside its model."""

    def __init__(self, seed: int) -> None:
        self.files = disk(seed)
        self.model = Model()
        self.log = Log.open(self.files, SMALL)
        self.count = 0

    def act(self, what: str, group: int, number: int, size: int) -> None:
        self.count += 1
        old = self.model.appended.get(group, Group())
        state, last = old.hard_state, old.last_index
        settled = max(state.commit, old.purged_index)
        term = max(state.term, old.last_term, 1)
        if what == "entries":
            self.append(group, None, entries(last + 1, [term] * (number + 1), group, size, self.count))
        elif what == "replace" and last > settled:
            first = max(settled + 1, last - number)
            self.append(
                group, HardState(term + 1, 0, state.commit), entries(first, [term + 1], group, size, self.count)
            )
        elif what == "state":
            commit = max(state.commit, min(last, state.commit + number))
            self.append(group, HardState(term + number % 2, state.vote if not number % 2 else number, commit), None)
        elif what == "start" and last > old.purged_index:
            index = min(last, old.purged_index + 1 + number)
            self.start_after(group, index, old.term_at(index))
        elif what == "install":
            index, term = max(settled, last - 2) + 1 + number, term + number % 2
            self.start_after(group, index, term, HardState(term, 0 if term > state.term else state.vote, index))
        elif what == "purge":
            with self.crashing():
                purge(self.log, self.model)
        elif what == "sync":
            with self.crashing():
                self.log.sync()
                self.model.sync()
        elif what == "power":
            self.files.lose_power_at = self.files.operations + number
        elif what == "fail":
            self.files.fail_at = self.files.operations + number
        elif what == "kill":
            self.restart()
        elif what == "reopen":
            with self.crashing():
                self.log.close()
                self.model.sync()
            self.restart()

    def append(self, group: int, hard_state: HardState | None, batch: Any) -> None:
        self.log.append(group, hard_state, batch)
        self.model.append(group, hard_state, batch)

    def start_after(self, group: int, index: int, term: int, hard_state: HardState | None = None) -> None:
        self.log.start_after(group, index, term, hard_state)
        self.model.start_after(group, index, term, hard_state)

    @contextlib.contextmanager
    def crashing(self) -> Iterator[None]:
        try:
            yield
        except DiskCrash:
            self.files.crash()
            self.restart()
        except InvariantError:
            self.restart()

    def restart(self) -> None:
        while True:
            try:
                self.log = Log.open(self.files, SMALL)
                break
            except DiskCrash:
                self.files.crash()
            except InvariantError:
                continue
        assert self.log.report.lost_durable_bytes == 0
        found = group_contents(self.log)
        assert self.model.allows(found)
        self.model = Model(found)

    def check(self) -> None:
        for group, expected in self.model.appended.items():
            first, end = expected.purged_index + 1, expected.last_index + 1
            assert self.log.last_index(group) == end - 1
            if first < end:
                assert self.log.read(group, first, end).to_pylist() == expected.rows
            if expected.purged_index:
                with pytest.raises(InvariantError, match="were asked for"):
                    self.log.read(group, first - 1, end)


@given(lives(), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_log_is_as_its_model_through_crashes(actions: list[tuple[str, int, int, int]], seed: int) -> None:
    life = Life(seed)
    for action in actions:
        life.act(*action)
        life.check()
    life.files.crash()
    life.restart()
    life.check()


def test_same_seed_gives_the_same_disk() -> None:
    def history(seed: int) -> list[bytes]:
        files = disk(seed)
        files.lose_power_at = 20
        run(files, Model(), SCRIPT)
        files.crash()
        return [files.read(f"log/{name}") for name in files.list("log")]

    assert history(5) == history(5)
    assert len({tuple(history(seed)) for seed in range(20)}) > 5


def test_random_lives_that_go_on_for_long() -> None:
    random = SystemRandom(11)
    kinds = ["entries", "entries", "replace", "state", "start", "purge", "sync", "sync", "sync"]
    kinds += ["install", "reopen", "kill", "power", "fail"]
    life = Life(3)
    for _ in range(400):
        kind = kinds[random.randrange(0, len(kinds))]
        life.act(kind, random.randrange(1, 4), random.randrange(0, 7), (0, 64, 640)[random.randrange(0, 3)])
    life.check()
    life.files.crash()
    life.restart()
    assert segment_numbers(life.files)[0] > 3
    assert segment_numbers(life.files)[-1] > 10
