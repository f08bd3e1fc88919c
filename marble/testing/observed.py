"""The node's log and tables, each with a witness beside it that holds them to the invariants.

Rule 1: what is observed is done first, exactly as in production; then the witness looks.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import pyarrow as pa

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.driver import Driver
from marble.logstore.log import Log
from marble.logstore.snapshots import SnapshotStore
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.store import CompactionTask, StorePolicy
from marble.machine import Result
from marble.members import decode_members
from marble.promises import Committed, Promises
from marble.raft.core import Raft
from marble.testing import invariants
from marble.testing.ledger import Ledger
from marble.testing.model import Model
from marble.types import HardState


class ObservedLog:
    """A `marble.jobs.Log`."""

    def __init__(self, log: Log, node: int, ledgers: dict[int, Ledger], core: Callable[[int], Raft | None]) -> None:
        self._log = log
        self._node = node
        self._ledgers = ledgers
        self._core = core
        self.read = log.read
        self.purge = log.purge
        self.room = log.room

    def append(self, group: int, hard_state: HardState | None, entries: pa.RecordBatch | None) -> None:
        """Observe and pass on."""
        self._log.append(group, hard_state, entries)
        ledger = self._ledgers[group]
        shelf = ledger.shelves[self._node]
        if entries is None:
            shelf.append(hard_state, 0, [])
            return
        first = entries.column("index")[0].as_py()
        terms = entries.column("term").to_pylist()
        invariants.log_matching(ledger, shelf, self._node, first, terms, entries.column("checksum").to_pylist())
        shelf.append(hard_state, first, terms)
        core = self._core(group)
        if core is not None:
            for index in entry_batch.changes(entries):
                members, _ = decode_members(entry_batch.payload(entries, index - first))
                invariants.membership_changes_one_at_a_time(ledger, core, index, terms[index - first], members)

    def start_after(self, group: int, index: int, term: int, hard_state: HardState | None = None) -> None:
        """Observe and pass on."""
        self._log.start_after(group, index, term, hard_state)
        ledger = self._ledgers[group]
        invariants.snapshot_is_committed(ledger, self._node, index, term)
        ledger.shelves[self._node].start_after(hard_state, ledger.committed[:index])

    def sync(self) -> None:
        """Observe and pass on."""
        self._log.sync()
        for ledger in self._ledgers.values():
            ledger.shelves[self._node].settle()


class ObservedMachine(TableMachine):
    """The node's tables."""

    def __init__(
        self,
        ledger: Ledger,
        node: int,
        model: Model | None = None,
        files: TableFiles | None = None,
        policy: StorePolicy | None = None,
        retention: int = 0,
    ) -> None:
        super().__init__(files=files, policy=policy, retention=retention)
        self._ledger = ledger
        self._node = node
        self.model = model
        self._prepared: CompactionTask | None = None

    def apply(self, entries: pa.RecordBatch) -> list[Result]:
        """Observe and pass on."""
        results = super().apply(entries)
        first = self.applied_index + 1 - len(results)
        names = ("term", "checksum", "session", "sequence")
        columns = [entries.column(name).to_pylist() for name in names]
        invariants.state_machine_safety(self._ledger, self._node, first, columns[0], columns[1], results)
        for index in entry_batch.changes(entries):
            members, _ = decode_members(entry_batch.payload(entries, index - first))
            self._ledger.note_membership(index, members)
        invariants.exactly_once(self._ledger, first, columns[2], columns[3], results)
        if self.model is not None:
            self._tell(self.model, first, entries, results)
        return results

    def _tell(self, model: Model, first: int, entries: pa.RecordBatch, results: list[Result]) -> None:
        """Tell the model of the entries that nobody has applied before."""
        names = ("kind", "table", "time_us")
        kinds, tables, times = (entries.column(name).to_pylist() for name in names)
        for row in range(model.index + 1 - first, len(results)):
            data = entry_batch.payload(entries, row)
            model.apply(kinds[row], tables[row], data, times[row], results[row], self)

    def prepare(self) -> None:
        """Plan the next compaction now, and let other things happen before it is carried out."""
        self._prepared = self._prepared or super().plan_compaction()

    def plan_compaction(self) -> CompactionTask | None:
        """What was prepared, if anything was."""
        prepared, self._prepared = self._prepared, None
        return prepared or super().plan_compaction()

    @property
    def oldest_index(self) -> int:
        """The first entry after which the state is kept."""
        return self._past[0].applied_index


class Seat:
    """One group at one node, in one life."""

    __slots__ = ("driver", "ledger", "machine", "offers", "promises", "raft", "snapshots")

    def __init__(
        self, driver: Driver, machine: ObservedMachine, ledger: Ledger, promises: Promises, snapshots: SnapshotStore
    ) -> None:
        self.driver = driver
        self.raft = driver.raft
        self.machine = machine
        self.ledger = ledger
        self.promises = promises
        self.snapshots = snapshots
        self.offers: list[tuple[Proposal, Future[Committed]]] = []

    def path(self, name: str) -> str:
        """Where the file of a table is."""
        return self.snapshots.contents.path(name)
