"""``marble log``: rows for people, from a log that may be live, torn or damaged."""

from __future__ import annotations

import pyarrow as pa
import pytest
from logstore.support import SEGMENT, SMALL, disk, entries

from marble.errors import CorruptionError
from marble.logstore.log import Log
from marble.logstore.scan import RecoveryReport
from marble.logstore.show import LogRow, rows
from marble.schema import ENTRY_SCHEMA
from marble.testing.disk import SimulatedFiles
from marble.types import HardState


def live_log() -> tuple[SimulatedFiles, Log]:
    files = disk()
    log = Log.open(files, SMALL)
    log.append(1, HardState(2, 3, 0), entries(1, [1, 2, 2], size=64))
    log.sync()
    log.append(1, None, entries(2, [3], size=128, mark=5))
    log.sync()
    return files, log


def test_rows_tell_everything_but_the_payload_and_change_nothing() -> None:
    files, log = live_log()
    before, reports = files.operations, []
    found = list(rows(files, reports.append))
    assert files.operations == before
    assert found[0] == LogRow(1, 832, 1, 0, 2, "HARD_STATE", 0, 0, 3, 0, True, 0)
    assert [(row.index, row.term, row.bytes, row.truncates) for row in found[1:]] == [
        (1, 1, 64, 0),
        (2, 2, 64, 0),
        (3, 2, 64, 0),
        (2, 3, 128, 2),
    ]
    assert found[4] == LogRow(1, 2432, 1, 2, 3, "WRITE", 1, 128, 5, 2, True, 2)
    assert reports == [RecoveryReport(segments=1, frames=2, bytes=log.nbytes)]
    log.append(1, None, entries(3, [3]))
    log.close()


def test_torn_tail_is_reported_after_the_rows() -> None:
    files, log = live_log()
    log.close()
    size = files.size(SEGMENT(1))
    files.cut(SEGMENT(1), size - 1)
    files.delete("log/SYNCED")
    reports: list[RecoveryReport] = []
    assert len(list(rows(files, reports.append))) == 4
    assert reports[0].cut_bytes > 0
    assert files.size(SEGMENT(1)) == size - 1


def test_rows_before_damage_are_shown() -> None:
    files, log = live_log()
    log.close()
    files.flip_bit(SEGMENT(1), 8 * (files.size(SEGMENT(1)) - 100))
    iterator = rows(files)
    assert [next(iterator).index for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(CorruptionError):
        next(iterator)


def test_wrong_checksum_and_unknown_kind_are_shown() -> None:
    files = disk()
    log = Log.open(files)
    batch = entries(1, [1, 1])
    for name, values in (("kind", [3, 77]), ("checksum", [1, 2])):
        at = ENTRY_SCHEMA.get_field_index(name)
        batch = batch.set_column(at, ENTRY_SCHEMA.field(at), pa.array(values, ENTRY_SCHEMA.field(at).type))
    log.append(1, None, batch)
    log.close()
    assert [(row.kind, row.checksum_ok) for row in rows(files)] == [("WRITE", False), ("77?", False)]


def test_directory_without_a_log_has_no_rows() -> None:
    assert list(rows(disk())) == []
