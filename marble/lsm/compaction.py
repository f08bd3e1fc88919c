"""What to compact next, and how.

Planning is pure: the same levels give the same plan. Level 0 is tiered: runs of files of similar size become one file
there, until so much has come together that merging it into level 1 is worth what has to be rewritten of that. The deeper
levels are leveled: each may be `CompactionPolicy.ratio` times as large as the one above it; the file that meets the fewest
bytes in the next level goes down first.

Rule 1: nothing that a reader can see depends on whether or when any of this happens.
Rule 2: a tombstone goes only when no older file may have its key. A row whose time to live is over becomes one, or goes, likewise:
an older version of its key may have a later time, and would come back.
Rule 3: what a merge makes of a row is a function of the row and of a time that the log has reached (`expired_until`), which never goes
back: so what it takes away no present or later state shows, and past states keep the files that they had.
Rule 4: planning comes to an end: a file is written anew on its own only if some of its rows go or lose their values by that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import pyarrow.compute as pc

from marble._core.lsm import Reader
from marble.lsm.files import Compression, TableFile, Versions
from marble.lsm.levels import Levels
from marble.lsm.view import expired_rows
from marble.schema import TableInfo

_MIB: Final = 1024 * 1024
_ALWAYS: Final = -(2**63)
_NEVER: Final = 2**63
"""Values of a TTL column that are over from the first entry on, and with none."""


@dataclass(frozen=True, slots=True)
class CompactionPolicy:
    """How large what may be. Local to a replica: no two need to have the same."""

    level0_files: int = 4
    """With so many files in level 0 something is done about them. Each is one more that a read may have to look into."""
    level0_files_max: int = 12
    """With so many they are merged into level 1, whatever that costs."""
    level0_share: int = 4
    """They also are when they have a share of one part in so many of what they meet in level 1."""
    level0_overlap_files: int = 2
    """With so many that overlap one another or level 1 they are merged as soon as they have no fewer bytes than what they meet
    there: all of it may have been written anew, so that half of what is kept would be of no use."""
    level1_bytes: int = 256 * _MIB
    ratio: int = 10
    """How much larger each level may be than the one above it."""
    file_bytes_max: int = 32 * _MIB
    """About where files of level 1 and below are split."""
    merge_rows: int = 65536
    """So many rows are merged at a time; a file ends between two such parts."""
    compressed_level: int = 2
    """From this level on, files are compressed if the table says how. What is above is written anew too often."""
    worn_share: int = 2
    """A file of which, as far as can be told, one part in so many is over or hides nothing is written anew without it, whatever else
    happens or does not: so a table that rests gives its room back, at a byte written for each one that goes."""

    def bytes_max(self, level: int) -> int:
        """What level 1 or a deeper one may have."""
        return self.level1_bytes * int(self.ratio ** (level - 1))

    def compression(self, info: TableInfo, level: int) -> Compression | None:
        """How files of `level` are compressed."""
        return info.options.compression if level >= self.compressed_level else None  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Plan:
    """Files to be replaced by others with the same content.

    - ``runs``: what goes, newest first; each a run of files that ascend and have no key in common.
    - ``level``: where the result goes.
    - ``rewrite``: whether there are new files; else the same ones change their level, or go if ``level`` is None.
    - ``drop_tombstones``: whether tombstones hide nothing any more.
    """

    runs: tuple[tuple[TableFile, ...], ...]
    level: int | None
    rewrite: bool = True
    drop_tombstones: bool = False

    @property
    def files(self) -> tuple[TableFile, ...]:
        """All that goes, newest first."""
        return tuple(file for run in self.runs for file in run)

    @property
    def names(self) -> frozenset[str]:
        """Names of these."""
        return frozenset(file.name for file in self.files)


def plan_compaction(
    levels: Levels,
    policy: CompactionPolicy,
    expired_until: int | None = None,
    damaged: Collection[str] = (),
    compressed: bool = False,
) -> Plan | None:
    """What to do next; None if all is well.

    Parameters
    ----------
    levels
        A table's files.
    policy
        See there.
    expired_until
        The highest value of the TTL column that is gone (`marble.table_options.expired_until`).
    damaged
        Names of files that cannot be read: left alone.
    compressed
        Whether files are compressed once they are deep enough.
    """
    for plan in _plans(levels, policy, expired_until, compressed):
        if not any(name in plan.names for name in damaged):
            return plan
    return None


def backlog_bytes(levels: Levels, policy: CompactionPolicy) -> int:
    """What of level 0 should have been merged long ago: 0 as long as compaction keeps up."""
    late = len(levels[0]) - policy.level0_files_max
    return sum(file.nbytes for file in levels[0]) if late > 0 else 0


def merged(plan: Plan, info: TableInfo, expired_until: int | None, merge_rows: int) -> Iterator[Versions]:
    """The content of `plan`'s files as it is to be written, by key, up to `merge_rows` rows at a time."""
    reader = Reader([], [[file.opened for file in run] for run in plan.runs])
    if expired_until is not None and all(_all_live(file, expired_until) for file in plan.files):
        expired_until = None
    for versions in reader.scan_versions(merge_rows, drop_tombstones=plan.drop_tombstones):
        kept = versions if expired_until is None else _expire(versions, info, expired_until, plan.drop_tombstones)
        if kept[0].num_rows:
            yield kept


def _expire(versions: Versions, info: TableInfo, expired_until: int, drop: bool) -> Versions:
    batch, indexes, deleted = versions
    expired = expired_rows(batch, info, expired_until)
    if not expired.true_count:
        return versions
    gone = pc.or_(deleted, expired)
    if not drop:
        return batch, indexes, gone
    kept = pc.invert(gone)
    return batch.filter(kept), indexes.filter(kept), gone.filter(kept)


def _all_live(file: TableFile, expired_until: int) -> bool:
    """Whether no row of `file` is over: its tombstones aside."""
    return file.rows == file.tombstones or (file.ttl_min is not None and file.ttl_min > expired_until)


def next_change(levels: Levels, policy: CompactionPolicy, expired_until: int) -> int | None:
    """The first value of the TTL column after `expired_until` with which there is another plan for a file on its own, if any."""
    ends: list[int] = []
    for file in levels:
        if file.ttl_max is not None:
            # Whether it hides anything may have changed by then: both are looked at.
            ends += [file.ttl_max, *(_worn_until(file, policy, hides) for hides in (False, True))]
    return min((end for end in ends if end > expired_until), default=None)


# -- plans, the most urgent first --------------------------------------------------------------------------------------


def _plans(levels: Levels, policy: CompactionPolicy, expired_until: int | None, compressed: bool) -> Iterator[Plan]:
    empty = _empty(levels, expired_until)
    if empty:
        yield Plan(tuple((file,) for file in empty), None, rewrite=False)
    if len(levels[0]) >= policy.level0_files:
        yield from _level0(levels, policy)
    elif len(levels[0]) >= policy.level0_overlap_files:
        yield from _overwritten(levels)
    scores = {
        level: sum(file.nbytes for file in levels[level]) / policy.bytes_max(level)
        for level in range(1, len(levels.levels))
    }
    for level in sorted(scores, key=lambda level: (-scores[level], level)):
        if scores[level] > 1:
            yield from _deeper(levels, level, compressed and level + 1 == policy.compressed_level)
    yield from _worn(levels, policy, expired_until)


def _empty(levels: Levels, expired_until: int | None) -> list[TableFile]:
    """Files without a row that still lives, under which there is nothing that they hide."""
    gone: list[TableFile] = []
    below: list[TableFile] = []
    for files in reversed(levels.levels):
        older = list(below)
        # Within level 0 files behind are older; within the others they have no key in common.
        for file in reversed(files):
            if _is_over(file, expired_until) and not any(each.meets(file.first_key, file.last_key) for each in older):
                gone.append(file)
                continue
            below.append(file)
            if files is levels.levels[0]:
                older.append(file)
    return gone


def _is_over(file: TableFile, expired_until: int | None) -> bool:
    """Whether no row of `file` lives."""
    if file.rows == file.tombstones:
        return True
    return expired_until is not None and file.ttl_max is not None and file.ttl_max <= expired_until


def _worn(levels: Levels, policy: CompactionPolicy, expired_until: int | None) -> Iterator[Plan]:
    """Files that are worth being written anew on their own, in their place."""
    until = _ALWAYS if expired_until is None else expired_until
    for level, files in enumerate(levels.levels):
        for place, file in enumerate(files):
            if until < _worn_until(file, policy, hides=False):
                continue
            ends = file.first_key, file.last_key
            behind = files[place + 1 :] if level == 0 else ()
            hides = levels.reaches_below(level, *ends) or any(each.meets(*ends) for each in behind)
            if until >= _worn_until(file, policy, hides):
                yield Plan(((file,),), level, drop_tombstones=not hides)


def _worn_until(file: TableFile, policy: CompactionPolicy, hides: bool) -> int:
    """With which value of the TTL column `file` is worn; `hides`: its tombstones have to stay.

    Where in their range the times of its rows lie is not known, so they are taken to be spread evenly. If they are not, the file may be
    written anew again: each time for rows that are over indeed, and for half of its range.
    """
    living = file.rows - file.tombstones
    wanted = -(-file.rows // policy.worn_share) - (0 if hides else file.tombstones)
    if wanted <= 0:
        return _ALWAYS
    if file.ttl_min is None or file.ttl_max is None or wanted > living:
        return _NEVER
    return file.ttl_min - 1 + -(-wanted * (file.ttl_max - file.ttl_min + 1) // living)


def _level0(levels: Levels, policy: CompactionPolicy) -> Iterator[Plan]:
    files = levels[0]
    first, last = _range(files)
    met = levels.overlapping(1, first, last)
    above, below = sum(file.nbytes for file in files), sum(file.nbytes for file in met)
    tiers = len(files) < policy.level0_files_max and above * policy.level0_share < below
    if tiers:
        start, end = _similar(files)
        if end - start > 1:
            run = files[start:end]
            hides = end < len(files) or levels.reaches_below(0, *_range(run))
            yield Plan(tuple((file,) for file in run), 0, drop_tombstones=not hides)
        return
    apart = sorted(files, key=lambda file: file.first_key)
    disjoint = all(a.last_key < b.first_key for a, b in pairwise(apart))
    if disjoint and not met and all(file.nbytes >= policy.file_bytes_max // 4 for file in files):
        yield Plan((tuple(apart),), 1, rewrite=False)
        return
    yield _into_level1(levels, met)


def _overwritten(levels: Levels) -> Iterator[Plan]:
    """Few files in level 0 that may be as much again of what is there already."""
    files = levels[0]
    met = levels.overlapping(1, *_range(files))
    apart = sorted(files, key=lambda file: file.first_key)
    disjoint = all(a.last_key < b.first_key for a, b in pairwise(apart))
    if (met or not disjoint) and sum(file.nbytes for file in files) >= sum(file.nbytes for file in met):
        yield _into_level1(levels, met)


def _into_level1(levels: Levels, met: tuple[TableFile, ...]) -> Plan:
    """All of level 0, and `met`, which it meets in level 1."""
    runs = [(file,) for file in levels[0]] + ([met] if met else [])
    first, last = _range([file for run in runs for file in run])
    return Plan(tuple(runs), 1, drop_tombstones=not levels.reaches_below(1, first, last))


def _similar(files: Sequence[TableFile]) -> tuple[int, int]:
    """The first run, from the newest file on, in which none is more than twice as large as all before it in the run."""
    for start in range(len(files) - 1):
        total, end = files[start].nbytes, start + 1
        while end < len(files) and files[end].nbytes <= 2 * total:
            total += files[end].nbytes
            end += 1
        if end - start > 1:
            return start, end
    return 0, 0


def _deeper(levels: Levels, level: int, rewrite: bool) -> Iterator[Plan]:
    """The ways to bring a file of `level` down, the cheapest for its size first; `rewrite`: not as it is."""

    def met(file: TableFile) -> tuple[TableFile, ...]:
        return levels.overlapping(level + 1, file.first_key, file.last_key)

    def cost(file: TableFile) -> float:
        return sum(each.nbytes for each in met(file)) / file.nbytes

    for file in sorted(levels[level], key=lambda file: (cost(file), file.first_key)):
        below = met(file)
        if not below and not rewrite:
            yield Plan(((file,),), level + 1, rewrite=False)
            continue
        hides = levels.reaches_below(level + 1, *_range((file, *below)))
        yield Plan(((file,), below) if below else ((file,),), level + 1, drop_tombstones=not hides)


def _range(files: Sequence[TableFile]) -> tuple[bytes, bytes]:
    return min(file.first_key for file in files), max(file.last_key for file in files)
