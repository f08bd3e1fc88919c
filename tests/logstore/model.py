"""What the user of a log may rely on, as plain values, for the tests that crash it.

After a crash each group holds what it held at the last sync that returned, or what it would have held after the one that
was under way; and what a restarted log has shown, it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from marble.logstore.log import Log
from marble.types import HardState


@dataclass(frozen=True)
class Group:
    """The log of one group: entries are the rows behind ``purged_index``."""

    hard_state: HardState = field(default_factory=HardState)
    purged_index: int = 0
    purged_term: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_index(self) -> int:
        return self.purged_index + len(self.rows)

    @property
    def last_term(self) -> int:
        return self.rows[-1]["term"] if self.rows else self.purged_term

    def term_at(self, index: int) -> int:
        return self.purged_term if index == self.purged_index else self.rows[index - self.purged_index - 1]["term"]

    def with_commit_in_range(self) -> Group:
        """As a start shows it: the commit index is a hint."""
        commit = min(max(self.hard_state.commit, self.purged_index), self.last_index)
        return replace(self, hard_state=replace(self.hard_state, commit=commit))


Contents = dict[int, Group]


class Model:
    """The contents of a log: as synced, and as appended."""

    def __init__(self, synced: Contents | None = None) -> None:
        self.synced: Contents = {} if synced is None else synced
        self.appended: Contents = dict(self.synced)

    def append(self, number: int, hard_state: HardState | None, batch: Any) -> None:
        group = self.appended.get(number, Group())
        rows = group.rows
        if batch is not None:
            added = batch.to_pylist()
            rows = rows[: added[0]["index"] - 1 - group.purged_index] + added
        self.appended[number] = replace(group, hard_state=hard_state or group.hard_state, rows=rows)

    def start_after(self, number: int, index: int, term: int, hard_state: HardState | None) -> None:
        group = self.appended.get(number, Group())
        keeps = index <= group.last_index and group.term_at(index) == term
        rows = group.rows[index - group.purged_index :] if keeps else []
        self.appended[number] = Group(hard_state or group.hard_state, index, term, rows)

    def sync(self) -> None:
        self.synced = dict(self.appended)

    def allows(self, found: Contents) -> bool:
        states = ({n: g.with_commit_in_range() for n, g in c.items()} for c in (self.synced, self.appended))
        return found in states


def group_contents(log: Log) -> Contents:
    """Everything that `log` had when it was opened, read from disk."""
    from logstore.support import contents

    return {
        number: Group(state, log.groups[number].purged_index, log.groups[number].purged_term, rows)
        for number, (state, rows) in contents(log).items()
    }


Step = Callable[[Log, Model], None]


def append(group: int, hard_state: HardState | None, batch: Any) -> Step:
    def step(log: Log, model: Model) -> None:
        # The model first: what a crash in the append leaves is for the next sync to write, or nothing.
        model.append(group, hard_state, batch)
        log.append(group, hard_state, batch)

    return step


def start_after(group: int, index: int, term: int, hard_state: HardState | None = None) -> Step:
    def step(log: Log, model: Model) -> None:
        model.start_after(group, index, term, hard_state)
        log.start_after(group, index, term, hard_state)

    return step


def sync(log: Log, model: Model) -> None:
    log.sync()
    model.sync()


def purge(log: Log, model: Model) -> None:
    before = log.nbytes
    freed = log.purge()
    assert log.nbytes == before - freed
