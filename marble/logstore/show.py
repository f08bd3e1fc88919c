"""The log as rows for people: what ``marble log DIR`` prints.

Rule 1: nothing is written and no lock is taken: it works on a copy, on a damaged log up to the damage, and beside a
        live node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from marble._core import entry_batch
from marble.env import Files
from marble.logstore.scan import RecoveryReport, Scan
from marble.types import EntryKind


@dataclass(frozen=True, slots=True)
class LogRow:
    """One row of the log. Of a HARD_STATE, ``index`` is the commit index and ``session`` the vote; of a SNAPSHOT, the log
    goes on behind ``index``, and ``sequence`` is the last entry before the row that stays.

    ``segment`` is the file's number, ``offset`` where the row's frame starts in it; ``bytes`` counts the payload.
    ``truncates`` counts the entries before it in the log whose place it takes: those from its index on, or those that a
    SNAPSHOT does not let stay.
    """

    segment: int
    offset: int
    group: int
    index: int
    term: int
    kind: str
    table: int
    bytes: int
    session: int
    sequence: int
    checksum_ok: bool
    truncates: int


def rows(files: Files, report: Callable[[RecoveryReport], None] | None = None) -> Iterator[LogRow]:
    """All rows of the log below ``log/`` of `files`, in the order in which they were written.

    Parameters
    ----------
    files
        The node's files.
    report
        Called after the last row with what a node would find if it opened this log, a torn tail for one.

    Raises
    ------
    CorruptionError
        After the rows before the damage were handed out.
    """
    scan = Scan(files)
    last: dict[int, int] = {}
    for scanned in scan.frames():
        batch = scanned.batch
        for at, row in enumerate(batch.drop_columns(["payload"]).to_pylist()):
            kind, group, index = row["kind"], row["group"], row["index"]
            payload = entry_batch.payload(batch, at)
            found = entry_batch.entry_checksum(kind, row["session"], row["sequence"], row["table"], payload)
            truncates = 0
            if kind != EntryKind.HARD_STATE:
                stays = row["sequence"] if kind == EntryKind.SNAPSHOT else index - 1
                truncates = max(0, last.get(group, 0) - stays)
                last[group] = max(stays, index)
            yield LogRow(
                segment=scanned.segment,
                offset=scanned.offset,
                group=group,
                index=index,
                term=row["term"],
                kind=EntryKind(kind).name if kind in EntryKind.__members__.values() else f"{kind}?",
                table=row["table"],
                bytes=payload.size,
                session=row["session"],
                sequence=row["sequence"],
                checksum_ok=found == row["checksum"],
                truncates=truncates,
            )
    if report is not None:
        report(scan.report)
