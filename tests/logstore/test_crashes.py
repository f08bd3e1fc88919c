"""Power lost, or the disk failing, at every single operation; and long random lives against a model.

The model of a log is what its user may rely on: after a crash each group holds what it held at the last sync that
returned, or what it would have held after the one that was under way; and what a restarted log has shown, it keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logstore.support import SEGMENT, SMALL, contents, disk, entries, reopened

from marble.env import SystemRandom
from marble.errors import InvariantError
from marble.logstore.log import Log
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.types import HardState

Group = tuple[HardState, list[dict[str, Any]]]
Contents = dict[int, Group]


class Model:
    """The contents of a log: as synced, and as appended."""

    def __init__(self, synced: Contents | None = None) -> None:
        self.synced: Contents = {} if synced is None else synced
        self.appended: Contents = dict(self.synced)

    def append(self, group: int, hard_state: HardState | None, batch: Any) -> None:
        old_state, rows = self.appended.get(group, (HardState(), []))
        if batch is not None:
            added = batch.to_pylist()
            rows = rows[: added[0]["index"] - 1] + added
        self.appended[group] = (hard_state or old_state, rows)

    def sync(self) -> None:
        self.synced = dict(self.appended)

    def allows(self, found: Contents) -> bool:
        return found in (self.synced, self.appended)


Step = Callable[[Log, Model], None]


def append(group: int, hard_state: HardState | None, batch: Any) -> Step:
    def step(log: Log, model: Model) -> None:
        # The model first: what a crash in the append leaves is for the next sync to write, or nothing.
        model.append(group, hard_state, batch)
        log.append(group, hard_state, batch)

    return step


def sync(log: Log, model: Model) -> None:
    log.sync()
    model.sync()


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


def run(files: SimulatedFiles, model: Model, script: tuple[Step, ...] = SCRIPT) -> None:
    """Live until the end of `script` or until the power goes or the disk fails."""
    with contextlib.suppress(DiskCrash, InvariantError):
        log = Log.open(files, SMALL)
        for step in script:
            step(log, model)
        log.close()


def operations_of(script: tuple[Step, ...]) -> int:
    files = disk()
    run(files, Model(), script)
    assert len([name for name in files.list("log") if name.endswith(".arrows")]) >= 2
    return files.operations


@pytest.mark.parametrize("seed", range(8))
def test_power_lost_at_every_operation(seed: int) -> None:
    for operation in range(1, operations_of(SCRIPT) + 1):
        files, model = disk(1000 * seed + operation), Model()
        files.lose_power_at = operation
        run(files, model)
        files.crash()
        log = Log.open(files, SMALL)
        assert log.report.lost_durable_bytes == 0
        found = contents(log)
        assert model.allows(found), f"operation {operation}"
        # What it has shown it keeps, and it can go on from there.
        files.crash()
        assert reopened(files, writable=True) == found
        log = Log.open(files, SMALL)
        log.append(9, HardState(1, 1, 0), entries(1, [1], group=9))
        log.sync()
        files.crash()
        after = reopened(files)
        assert after.pop(9)[0] == HardState(1, 1, 0)
        assert after == found


@pytest.mark.parametrize("seed", range(4))
def test_power_lost_again_at_every_operation_of_the_recovery(seed: int) -> None:
    for operation in range(1, operations_of(SCRIPT) + 1, 3):
        for second in range(1, 12):
            files, model = disk(1000 * seed + operation), Model()
            files.lose_power_at = operation
            run(files, model)
            files.crash()
            shown: Contents | None = None
            files.lose_power_at = files.operations + second
            with contextlib.suppress(DiskCrash):
                shown = reopened(files, writable=True)
            files.crash()
            found = reopened(files, writable=True)
            assert model.allows(found)
            assert shown is None or found == shown


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kill_first", [False, True])
def test_disk_fails_at_every_operation(seed: int, kill_first: bool) -> None:
    """After a failed sync data may look sound and be nowhere: what a restarted process shows must be on the disk."""
    for operation in range(1, operations_of(SCRIPT) + 1):
        files, model = disk(1000 * seed + operation), Model()
        files.fail_at = operation
        run(files, model)
        shown = None
        if kill_first:
            shown = reopened(files, writable=True)
            assert model.allows(shown)
        files.crash()
        found = reopened(files, writable=True)
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
    visible = files.read(SEGMENT(1))
    assert len(reopened(files)[1][1]) == 2, "a reader sees both"
    naive = files.copy()
    naive.open_append(SEGMENT(1)).sync()
    naive.crash()
    assert len(naive.read(SEGMENT(1))) < len(visible), "the next sync returned, and the data is gone"
    assert len(reopened(files, writable=True)[1][1]) == 2
    files.crash()
    assert len(reopened(files)[1][1]) == 2


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    action = st.tuples(
        st.sampled_from(["entries", "entries", "replace", "state", "sync", "sync", "reopen", "kill", "power", "fail"]),
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
        state, rows = self.model.appended.get(group, (HardState(), []))
        term = max(state.term, rows[-1]["term"] if rows else 0, 1)
        if what == "entries":
            self.append(group, None, entries(len(rows) + 1, [term] * (number + 1), group, size, self.count))
        elif what == "replace" and len(rows) > state.commit:
            first = max(state.commit + 1, len(rows) - number)
            self.append(
                group, HardState(term + 1, 0, state.commit), entries(first, [term + 1], group, size, self.count)
            )
        elif what == "state":
            commit = max(state.commit, min(len(rows), state.commit + number))
            self.append(group, HardState(term + number % 2, state.vote if not number % 2 else number, commit), None)
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
        found = contents(self.log)
        assert self.model.allows(found)
        self.model = Model(found)

    def check(self) -> None:
        for group, (_, rows) in self.model.appended.items():
            assert self.log.last_index(group) == len(rows)
            if rows:
                assert self.log.read(group, 1, len(rows) + 1).to_pylist() == rows


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
        run(files, Model())
        files.crash()
        return [files.read(f"log/{name}") for name in files.list("log")]

    assert history(5) == history(5)
    assert len({tuple(history(seed)) for seed in range(20)}) > 5


def test_random_lives_that_go_on_for_long() -> None:
    random = SystemRandom(11)
    kinds = ["entries", "replace", "state", "sync", "sync", "sync", "reopen", "kill", "power", "fail"]
    life = Life(3)
    for _ in range(400):
        kind = kinds[random.randrange(0, len(kinds))]
        life.act(kind, random.randrange(1, 4), random.randrange(0, 7), (0, 64, 640)[random.randrange(0, 3)])
    life.check()
    life.files.crash()
    life.restart()
    assert len([name for name in life.files.list("log") if name.endswith(".arrows")]) > 10
