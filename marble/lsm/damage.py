"""What a machine does about files that are damaged or missing: it says so, leaves them alone, and takes them back healed.

Rule 1: damage is noticed where a file is opened or read, never guessed. What reads meanwhile either does without the file or
raises the error that names it.
Rule 2: a file that was said to be damaged and is sound on the disk by now is opened anew, and is no damage: whoever read it
had an old mapping.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from functools import partial

import pyarrow as pa

from marble.errors import CorruptionError
from marble.lsm.store import Store
from marble.lsm.tree import Below, Tree
from marble.machine import FILES_SCHEMA, FileRef, Pace


class Healing(abc.ABC):
    """What a machine of tables does to be a `marble.machine.HealingMachine`."""

    _store: Store | None

    @property
    @abc.abstractmethod
    def applied_index(self) -> int: ...
    @abc.abstractmethod
    def restore(self, index: int, batches: Iterable[pa.RecordBatch]) -> None: ...
    @abc.abstractmethod
    def _restore(self, index: int, batches: Iterable[pa.RecordBatch], *, salvage: bool) -> None: ...
    @abc.abstractmethod
    def _rebuild(self, index: int, batches: Iterable[pa.RecordBatch], entries: Iterable[pa.RecordBatch]) -> None: ...
    @abc.abstractmethod
    def _all_trees(self) -> list[Tree]: ...

    def salvage(self, index: int, batches: Iterable[pa.RecordBatch]) -> None:
        """As `restore`, also if files are missing or damaged: see `marble.machine.HealingMachine`."""
        self._restore(index, batches, salvage=True)

    def rebuild(self, index: int, batches: Iterable[pa.RecordBatch], entries: Iterable[pa.RecordBatch]) -> None:
        """Build the state anew from one at `index` and the entries that follow it; see `marble.machine.HealingMachine`."""
        if index >= self.applied_index:
            self.restore(index, batches)
        else:
            self._rebuild(index, batches, entries)

    def blame(self, error: CorruptionError) -> bool:
        """Note that a file is damaged, if `error` says so of one of this machine's; returns whether it does. Any thread."""
        return self._store is not None and Damage(self._store, self._all_trees).blame(error)

    def scrub(self, after: str, pace: Pace | None = None) -> tuple[str, int, CorruptionError | None]:
        """Check the file that comes after `after`; see `marble.machine.HealingMachine`."""
        return ("", 0, None) if self._store is None else Damage(self._store, self._all_trees).scrub(after, pace)

    def live(self) -> list[FileRef]:
        """The files that the present state consists of."""
        return [file.ref for tree in self._all_trees() for file in tree.below.levels]

    def damaged(self) -> list[FileRef]:
        """The files of the present state that are damaged or missing."""
        return [] if self._store is None else Damage(self._store, self._all_trees).found()

    def healed(self, name: str) -> None:
        """The file with this name is there again and sound: use it. Raises CorruptionError if it is not."""
        if self._store is not None:
            Damage(self._store, self._all_trees).healed(name)


class Damage:
    """Of one machine. Any thread.

    Parameters
    ----------
    store
        Its files.
    trees
        Gives its tables of now.
    """

    def __init__(self, store: Store, trees: Callable[[], list[Tree]]) -> None:
        self._store = store
        self._trees = trees

    def blame(self, error: CorruptionError) -> bool:
        """Note that a file of a table is damaged, if `error` says so; returns whether it does."""
        store = self._store
        name = None if error.path is None else store.files.name_of(error.path)
        if name is None:
            return False
        if name not in store.damaged:
            if store.files.is_sound(name):
                self.healed(name)
            else:
                store.damaged[name] = error
        return True

    def scrub(self, after: str, pace: Pace | None) -> tuple[str, int, CorruptionError | None]:
        """Read the file that comes after `after`, and note it if it is damaged."""
        store, names = self._store, self._names()
        name = min((each for each in names if each > after), default="")
        if not name or name in store.damaged or store.files.is_sound(name, pace) or name not in self._names():
            return name, len(names), None
        where = store.files.describe(name)
        damage = CorruptionError("a file of a table is not what it was when it was written", where)
        store.damaged[name] = damage
        return name, len(names), damage

    def _names(self) -> set[str]:
        return {file.name for tree in self._trees() for file in tree.below.levels}

    def found(self) -> list[FileRef]:
        """The files of the tables that are damaged or missing."""
        files = {file.name: file for tree in self._trees() for file in tree.below.levels}
        return [file.ref for file in files.values() if file.name in self._store.damaged or file.damage is not None]

    def healed(self, name: str) -> None:
        """The file is sound by now: use it wherever it belongs. Raises CorruptionError if it is not."""
        store = self._store
        for tree in self._trees():
            for level, files in enumerate(tree.below.levels.levels):
                for file in files:
                    if file.name == name:
                        row = {field: getattr(file, field) for field in FILES_SCHEMA.names if field != "level"}
                        opened = store.files.open(row, tree.info)
                        store.edit(tree, partial(Below.reopened, level=level, file=opened))
        store.damaged.pop(name, None)
