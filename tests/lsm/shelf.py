"""What the tests of tables in files share: a machine, its files and snapshots, and what a node does with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from marble.env import SystemRandom
from marble.logstore.snapshots import SnapshotStore
from marble.lsm.compaction import CompactionPolicy
from marble.lsm.files import BLOCK_ROWS_MAX, TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.store import Store, StorePolicy
from marble.testing.disk import SimulatedFiles
from marble.types import Members, SnapshotMeta

GROUP = 7

TINY = StorePolicy(
    CompactionPolicy(
        level0_files=2, level0_files_max=3, level0_share=2, level1_bytes=4096, ratio=2, file_bytes_max=2048
    ),
    inline_table_bytes_max=-1,
)
"""Everything goes into files at once, and these change all the time."""


class Noting(SimulatedFiles):
    """A disk that calls `note` before each operation."""

    def note(self, what: str, path: str) -> None:
        """For who derives from it."""

    @contextlib.contextmanager
    def operation(self, what: str, path: str) -> Iterator[bool]:
        if not self._off:
            self.note(what, path)
        with super().operation(what, path) as failing:
            yield failing

    def _before_sync(self, what: str, path: str, node: Any) -> None:
        if not self._off:
            self.note(what, path)
        super()._before_sync(what, path, node)


class Shelf:
    """A machine with files, its snapshots, and what a node does with both."""

    def __init__(
        self,
        files: SimulatedFiles | None = None,
        policy: StorePolicy = TINY,
        *,
        block_rows_max: int = BLOCK_ROWS_MAX,
        **options: Any,
    ) -> None:
        self.files = files or SimulatedFiles(SystemRandom(1))
        self.machine = TableMachine(
            files=TableFiles(self.files, GROUP, block_rows_max=block_rows_max), policy=policy, **options
        )
        self.snapshots = SnapshotStore(self.files, GROUP)
        newest = self.snapshots.newest()
        if newest is not None:
            self.machine.restore(newest.index, self.snapshots.read(newest))
        self.machine.collect(self.snapshots.kept)

    @property
    def store(self) -> Store:
        assert self.machine.store is not None
        return self.machine.store

    def snapshot(self) -> None:
        """As `marble.jobs.WriteJob` does it."""
        state = self.machine.capture()
        self.snapshots.write(SnapshotMeta(state.applied_index, 1, Members((1,))), {}, state.batches())
        self.snapshots.prune(state.applied_index)
        self.machine.collect(self.snapshots.kept)

    def compact(self, most: int = 100) -> int:
        """Compact until nothing is to be done. Returns how often something was."""
        for count in range(most):
            task = self.machine.plan_compaction()
            if task is None:
                return count
            task.run()
        return most

    def reopened(self) -> Shelf:
        """What another process finds."""
        return Shelf(self.files)

    def names(self) -> list[str]:
        """The files that are there."""
        return [name for name in self.files.list("tables") if name.endswith(".arrow")]

    def levels(self, table: int = 1) -> list[int]:
        """How many files each level has."""
        return [len(files) for files in self.machine._trees[table].below.levels.levels]
