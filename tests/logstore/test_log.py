"""The log as its users see it: append, sync, read, truncate, roll, fail, close."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest
from logstore.support import SEGMENT, SMALL, contents, disk, entries, reopened

from marble._core import entry_batch
from marble.env import SystemFiles
from marble.errors import CorruptionError, InvariantError, UsageError
from marble.logstore.log import Log, LogOptions
from marble.testing.disk import SimulatedAppendFile, SimulatedFiles
from marble.types import HardState

MIB = 1 << 20


def rows_of(log: Log, first: int, end: int, group: int = 1, bytes_max: int = 2**63 - 1) -> list[tuple[int, int]]:
    batch = log.read(group, first, end, bytes_max)
    return list(zip(batch.column("index").to_pylist(), batch.column("term").to_pylist(), strict=True))


def test_new_log_is_empty_and_stays_so() -> None:
    files = disk()
    for _ in range(2):
        log = Log.open(files)
        assert log.groups == {}
        assert log.last_index(1) == 0
        assert (log.report.frames, log.report.cut_path, log.report.lost_durable_bytes) == (0, None, 0)
        log.close()
    assert files.list("log") == ["0000000000000001.arrows", "SYNCED"]


def test_entries_are_readable_before_and_after_the_sync_and_after_reopening() -> None:
    files = disk()
    log = Log.open(files)
    first, second = entries(1, [1, 1, 2]), entries(4, [2, 3])
    log.append(1, HardState(3, 2, 0), first)
    assert log.read(1, 1, 4).equals(first)
    log.append(1, None, second)
    expected = pa.Table.from_batches([first, second])
    assert pa.Table.from_batches([log.read(1, 1, 6)]).equals(expected.combine_chunks())
    log.sync()
    assert log.read(1, 1, 6).to_pylist() == expected.to_pylist()
    log.append(1, HardState(3, 2, 4), None)
    log.close()
    found = reopened(files)
    assert found == {1: (HardState(3, 2, 4), expected.to_pylist())}


def test_one_sync_serves_all_groups_with_one_write() -> None:
    files = disk()
    log = Log.open(files)
    log.append(2, HardState(1, 1, 0), entries(1, [1], group=2))
    log.append(1, HardState(5, 0, 0), entries(1, [4, 5]))
    log.append(2, HardState(1, 1, 1), entries(2, [1], group=2))
    before = files.operations
    log.sync()
    # The frame, its sync and the mark.
    assert files.operations - before == 3
    before = files.operations
    log.sync()
    assert files.operations == before, "nothing was waiting"
    log.close()
    found = reopened(files)
    assert found[1][0] == HardState(5, 0, 0)
    assert found[2][0] == HardState(1, 1, 1)
    assert [len(rows) for _, rows in found.values()] == [2, 2]


@pytest.mark.parametrize("synced_before", [False, True])
@pytest.mark.parametrize("synced_after", [False, True])
@pytest.mark.parametrize("first", [2, 3, 5, 7])
def test_later_entries_replace_earlier_ones_from_their_first_index_on(
    first: int, synced_before: bool, synced_after: bool
) -> None:
    files = disk()
    log = Log.open(files)
    for start in (1, 3, 5):
        log.append(1, None, entries(start, [1, 1]))
        if synced_before:
            log.sync()
    log.append(1, HardState(2, 0, 0), entries(first, [2, 2], mark=1))
    if synced_after:
        log.sync()
    expected = [(index, 1) for index in range(1, first)] + [(first, 2), (first + 1, 2)]
    assert rows_of(log, 1, first + 2) == expected
    assert log.last_index(1) == first + 1
    with pytest.raises(InvariantError, match="were asked for"):
        log.read(1, first + 2, first + 3)
    log.append(1, None, entries(first + 2, [2], mark=2))
    log.close()
    log = Log.open(files)
    assert rows_of(log, 1, first + 3) == [*expected, (first + 2, 2)]
    # Replay applies truncations too (etcd#22442), and goes on from there.
    assert log.groups[1].last_index == first + 2
    assert contents(log)[1][1][first - 1]["session"] == 1
    log.close()


def test_truncation_while_a_sync_is_under_way_wins() -> None:
    files = BlockingFiles()
    log = Log.open(files)
    log.append(1, None, entries(1, [1, 1, 1, 1]))
    with files.blocked_sync(log):
        # The four entries are being written: they can be read, replaced, and added to.
        assert rows_of(log, 1, 5) == [(1, 1), (2, 1), (3, 1), (4, 1)]
        log.append(1, HardState(2, 0, 0), entries(3, [2], mark=1))
        assert rows_of(log, 1, 4) == [(1, 1), (2, 1), (3, 2)]
    assert rows_of(log, 1, 4) == [(1, 1), (2, 1), (3, 2)]
    log.append(1, None, entries(1, [2, 2, 2], mark=2))
    with files.blocked_sync(log):
        log.append(1, None, entries(1, [2], mark=3))
    assert log.read(1, 1, 2).column("session").to_pylist() == [3]
    log.close()
    log = Log.open(files, writable=False)
    assert rows_of(log, 1, 2) == [(1, 2)]
    assert log.groups[1].last_index == 1


def test_read_stops_at_its_limit_but_gives_at_least_one() -> None:
    files = disk()
    log = Log.open(files)
    for first in (1, 4, 7):
        log.append(1, None, entries(first, [1, 1, 1], size=100))
        log.sync()
    log.append(1, None, entries(10, [1], size=100))
    for bytes_max, expected in (
        (0, 1),
        (99, 1),
        (100, 1),
        (200, 2),
        (299, 2),
        (300, 3),
        (301, 3),
        (400, 4),
        (10_000, 9),
    ):
        assert log.read(1, 2, 11, bytes_max).num_rows == expected
    assert [batch.num_rows for batch in log.replay(1, 3, 11)] == [8]
    assert log.read(1, 9, 11).num_rows == 2
    for first, end in ((0, 2), (3, 3), (4, 3), (11, 12), (1, 12)):
        with pytest.raises(InvariantError):
            log.read(1, first, end)
    with pytest.raises(InvariantError):
        log.read(2, 1, 2)


def test_read_from_disk_is_as_from_memory_and_aligned() -> None:
    files = disk()
    log = Log.open(files, LogOptions(segment_bytes_max=8192, cache_bytes_max=0))
    for first in range(1, 40, 2):
        other = first % 3
        log.append(other, None, entries(log.last_index(other) + 1, [1], other))
        log.append(7, None, entries(first, [first, first], 7, size=640))
        log.sync()
    assert len(files.list("log")) > 3
    whole = log.read(7, 1, 41)
    whole.validate(full=True)
    entry_batch.verify(whole)
    assert whole.column("index").to_pylist() == list(range(1, 41))
    assert all(entry_batch.payload(whole, row).address % 64 == 0 for row in range(40))
    assert sum(batch.num_rows for batch in log.replay(7, 5, 20)) == 15
    log.close()


def test_cache_is_bounded_and_spares_the_disk() -> None:
    files = disk()
    log = Log.open(files, LogOptions(cache_bytes_max=8192))
    for first in range(1, 30):
        log.append(1, None, entries(first, [1], size=1024))
        log.sync()
    assert 0 < log._cache.nbytes <= 8192
    assert log._cache.nbytes == sum(length for _, length in log._cache._frames.values())
    # The newest frames come from memory, though their bytes on disk are gone.
    size = files.size(SEGMENT(1))
    files.cut(SEGMENT(1), size - 2000)
    assert log.read(1, 29, 30).num_rows == 1
    assert log.read(1, 1, 2).num_rows == 1


def test_damage_that_comes_after_opening_is_found_by_the_read() -> None:
    files = disk()
    log = Log.open(files, LogOptions(cache_bytes_max=0))
    log.append(1, None, entries(1, [1] * 3))
    log.sync()
    log.append(1, None, entries(4, [1] * 3))
    log.sync()
    second = log.nbytes // 2
    files.flip_bit(SEGMENT(1), 8 * log.nbytes - 500)
    assert log.read(1, 1, 4).num_rows == 3
    with pytest.raises(CorruptionError, match="after it had been opened") as caught:
        log.read(1, 4, 7)
    assert caught.value.path == "simulated:" + SEGMENT(1)
    assert caught.value.offset is not None
    assert caught.value.offset > second // 2


def test_segments_roll_and_are_read_by_arrow(tmp_path: object) -> None:
    files = SystemFiles(str(tmp_path))
    log = Log.open(files, SMALL)
    for first in range(1, 21):
        log.append(1, HardState(1, 1, first - 1), entries(first, [1], size=1000))
        log.sync()
    log.close()
    numbers = [name for name in files.list("log") if name.endswith(".arrows")]
    assert len(numbers) >= 5
    indexes = []
    for name in numbers:
        assert files.size(f"log/{name}") <= SMALL.segment_bytes_max
        table = pa.ipc.open_stream(files.describe(f"log/{name}")).read_all()
        table.validate(full=True)
        indexes += [row["index"] for row in table.to_pylist() if row["kind"] == 3]
    assert indexes == list(range(1, 21))
    assert len(reopened(files)[1][1]) == 20
    reader = Log.open(files, writable=False)
    assert reader.nbytes == sum(files.size(f"log/{name}") for name in numbers)


def test_what_does_not_fit_one_frame_takes_several() -> None:
    files = disk()
    options = LogOptions(frame_bytes_max=MIB, segment_bytes_max=64 * MIB)
    log = Log.open(files, options)
    log.append(1, HardState(1, 1, 0), entries(1, [1] * 30, size=100_000))
    log.append(2, HardState(2, 2, 0), entries(1, [1] * 30_000, group=2, size=0))
    log.append(1, None, entries(31, [1], size=MIB - 4096))
    before = files.operations
    log.sync()
    assert files.operations - before > 5
    assert log.read(1, 1, 32).num_rows == 31
    log.close()
    found = reopened(files, options)
    assert [row["index"] for row in found[1][1]] == list(range(1, 32))
    assert len(found[2][1]) == 30_000
    assert (found[1][0], found[2][0]) == (HardState(1, 1, 0), HardState(2, 2, 0))


def test_entry_that_fits_no_frame_is_refused() -> None:
    log = Log.open(disk(), LogOptions(frame_bytes_max=MIB))
    with pytest.raises(UsageError, match="does not fit a frame"):
        log.append(1, HardState(1, 1, 0), entries(1, [1, 1], size=MIB))
    assert log.last_index(1) == 0
    log.append(1, None, entries(1, [1]))
    log.sync()


@pytest.mark.parametrize(
    ("hard_state", "batch", "words"),
    [
        (None, entries(5, [2]), "gap"),
        (None, entries(4, [1]), "terms fall"),
        (None, entries(2, [2]), "committed"),
        (HardState(1, 0, 0), None, "went back"),
        (HardState(2, 4, 0), None, "vote"),
        (HardState(2, 0, 0), None, "vote"),
        (HardState(2**63, 0, 0), None, "range"),
        (HardState(3, 0, 9), entries(2, [3]), "committed"),
        (None, entries(4, [2], group=3), "another group"),
    ],
)
def test_append_refuses_what_contradicts_the_log(
    hard_state: HardState | None, batch: pa.RecordBatch | None, words: str
) -> None:
    files = disk()
    log = Log.open(files)
    log.append(1, HardState(2, 3, 2), entries(1, [1, 2, 2]))
    with pytest.raises(InvariantError, match=words):
        log.append(1, hard_state, batch)
    # Nothing of it was taken over, and the log is unharmed.
    log.append(1, HardState(2, 3, 3), entries(3, [2]))
    log.append(1, HardState(2, 3, 3), entries(4, [2]))
    log.close()
    found = reopened(files)
    assert found[1][0] == HardState(2, 3, 3)
    assert [row["index"] for row in found[1][1]] == [1, 2, 3, 4]


@pytest.mark.parametrize("operation", [1, 2, 3])
def test_failed_sync_ends_the_log_for_ever(operation: int) -> None:
    files = disk()
    log = Log.open(files)
    log.append(1, None, entries(1, [1]))
    log.sync()
    log.append(1, None, entries(2, [1]))
    files.fail_at = files.operations + operation
    with pytest.raises(InvariantError, match="must stop"):
        log.sync()
    for call in (
        log.sync,
        lambda: log.append(1, None, entries(3, [1])),
        lambda: log.append(1, HardState(9, 0, 0), None),
        lambda: log.read(1, 1, 2),
    ):
        with pytest.raises(InvariantError, match="has failed"):
            call()
    before = files.operations
    log.close()
    assert files.operations == before, "a failed log writes nothing more"


def test_failure_while_a_segment_is_started_ends_the_log() -> None:
    for operation in range(1, 11):
        files = disk(operation)
        log = Log.open(files, SMALL)
        log.append(1, None, entries(1, [1] * 5, size=1024))
        log.sync()
        log.append(1, None, entries(6, [1] * 5, size=1024))
        files.fail_at = files.operations + operation
        if operation == 10:
            log.sync()
            continue
        with pytest.raises(InvariantError):
            log.sync()
        files.crash()
        assert [row["index"] for row in reopened(files, writable=True)[1][1]] in ([*range(1, 6)], [*range(1, 11)])


def test_interrupted_sync_ends_the_log_too() -> None:
    files = disk()
    log = Log.open(files)
    log.append(1, None, entries(1, [1]))

    def interrupt(path: str, node: object) -> None:
        raise KeyboardInterrupt

    files.sync_node = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        log.sync()
    with pytest.raises(InvariantError, match="KeyboardInterrupt"):
        log.sync()


def test_closed_log_says_so() -> None:
    files = disk()
    log = Log.open(files)
    log.append(1, None, entries(1, [1]))
    log.close()
    log.close()
    with pytest.raises(UsageError, match="closed"):
        log.append(1, None, entries(2, [1]))
    with pytest.raises(UsageError, match="closed"):
        log.read(1, 1, 2)
    assert len(reopened(files)[1][1]) == 1


def test_reader_changes_nothing() -> None:
    files = disk()
    assert Log.open(files, writable=False).groups == {}
    assert files.operations == 0
    log = Log.open(files)
    log.append(1, None, entries(1, [1]))
    log.sync()
    files.cut(SEGMENT(1), log.nbytes - 1)
    before = files.operations
    reader = Log.open(files, writable=False)
    assert reader.report.lost_durable_bytes > 0
    with pytest.raises(UsageError, match="reading only"):
        reader.append(1, None, entries(2, [1]))
    with pytest.raises(UsageError, match="reading only"):
        reader.sync()
    reader.close()
    assert files.operations == before


def test_options_are_checked() -> None:
    for bad in (
        {"frame_bytes_max": 1000},
        {"frame_bytes_max": 2**31},
        {"segment_bytes_max": 1},
        {"cache_bytes_max": -1},
    ):
        with pytest.raises(UsageError):
            LogOptions(**bad)


class BlockingFiles(SimulatedFiles):
    """A disk whose next sync can be held up."""

    def __init__(self) -> None:
        super().__init__(random=None)  # type: ignore[arg-type]
        self.entered = threading.Event()
        self.release = threading.Event()
        self.release.set()

    def sync_node(self, path: str, node: object) -> None:
        self.entered.set()
        assert self.release.wait(30)
        super().sync_node(path, node)  # type: ignore[arg-type]

    def blocked_sync(self, log: Log) -> BlockedSync:
        return BlockedSync(self, log)


class BlockedSync:
    """While the block runs, another thread is inside ``log.sync()``, with everything written and nothing synced."""

    def __init__(self, files: BlockingFiles, log: Log) -> None:
        self._files = files
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=[log])

    def _run(self, log: Log) -> None:
        try:
            log.sync()
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> None:
        self._files.release.clear()
        self._files.entered.clear()
        self._thread.start()
        assert self._files.entered.wait(30)

    def __exit__(self, *_: object) -> None:
        self._files.release.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self._errors == []


def test_appends_during_a_sync_wait_for_the_next_one() -> None:
    files = BlockingFiles()
    log = Log.open(files)
    log.append(1, None, entries(1, [1]))
    with files.blocked_sync(log):
        log.append(1, HardState(1, 1, 0), entries(2, [1]))
        before = files.read(SEGMENT(1))
    assert files.read(SEGMENT(1)) == before
    log.sync()
    assert files.read(SEGMENT(1)) != before
    log.close()
    assert len(reopened(files)[1][1]) == 2
    assert isinstance(files.open_append(SEGMENT(1)), SimulatedAppendFile)
