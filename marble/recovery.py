"""What one group of a node starts from: the newest snapshot that its log goes on from, and the log behind it.

Rule 1: a snapshot is used only if the log has its entry, by index and term, or has purged exactly up to it. One that arrived
from a leader and was not taken up before the node stopped is ahead of the log: it is left alone, and may be offered again.
Rule 2: a log that was purged and no snapshot to go before it is damage. Nothing is made up for what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from marble._core.term_index import TermIndex
from marble.driver import DurableState
from marble.errors import CorruptionError
from marble.logstore.replay import GroupState
from marble.logstore.snapshots import SnapshotInfo, SnapshotStore
from marble.machine import HealingMachine, StateMachine, StoredMachine
from marble.types import HardState, Members


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found, and put into the machine."""

    state: DurableState
    """For the core."""
    endpoints: Mapping[int, str]
    """Where members are reached, as far as the snapshot says."""


def recover(
    group: int, found: GroupState | None, store: SnapshotStore | None, genesis: Members, machine: StateMachine
) -> Recovered:
    """Make ready what a driver of `group` is made from.

    Parameters
    ----------
    group
        Number of the group.
    found
        What the log recovered of it; None if it has nothing.
    store
        Its snapshots; None if this node keeps none.
    genesis
        Who takes part before the first entry.
    machine
        Still empty. Afterwards it has the state of the snapshot, if there is one, and no file that nobody needs.

    Raises
    ------
    CorruptionError
        The log was purged, and there is no snapshot for what is missing; or the snapshot is damaged.
    """
    purged_index = found.purged_index if found is not None else 0
    term_index = found.term_index if found is not None else TermIndex()
    snapshot = None if store is None else newest(store.infos(), term_index)
    if snapshot is None and purged_index:
        raise CorruptionError(
            f"the log of group {group} begins after entry {purged_index}, and no snapshot goes up to there: remove this node "
            "from the cluster and add it again under a new id, with an empty directory"
        )
    if snapshot is not None:
        assert store is not None
        if isinstance(machine, HealingMachine):
            # A file that is gone is fetched from a peer later. Until then what needs it fails, and nothing else.
            machine.salvage(snapshot.index, store.read(snapshot))
        else:
            machine.restore(snapshot.index, store.read(snapshot))
    if store is not None and isinstance(machine, StoredMachine) and not store.has_partial:
        # What an earlier process wrote and nothing refers to: of a flush or a compaction that came too late. What belongs
        # to a snapshot of which a part is here may be wanted soon, until this node has made one of its own.
        machine.collect(store.kept)
    state = DurableState(
        hard_state=found.hard_state if found is not None else HardState(),
        members=genesis if snapshot is None else snapshot.members,
        term_index=term_index,
        applied_index=0 if snapshot is None else snapshot.index,
        snapshot=None if snapshot is None else snapshot.meta,
        changes=() if found is None else tuple(found.changes),
    )
    return Recovered(state, {} if snapshot is None else dict(snapshot.endpoints))


def newest(infos: Sequence[SnapshotInfo], log: TermIndex) -> SnapshotInfo | None:
    """The newest of `infos`, which ascend, that `log` goes on from."""
    for info in reversed(infos):
        if log.first_index - 1 <= info.index <= log.last_index and log.term_at(info.index) == info.term:
            return info
    return None
