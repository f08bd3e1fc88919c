"""What is cut, what is damage, what is lost: cuts at every byte, flips of every bit, and counterfeits."""

from __future__ import annotations

import contextlib
from typing import Any

import pyarrow as pa
import pytest
from logstore.support import SEGMENT, SMALL, SYNCED, contents, disk, entries, frame_ends, reopened

from marble._core import frame
from marble.env import SystemRandom
from marble.errors import CorruptionError
from marble.logstore import segment as segment_module
from marble.logstore.log import Log, LogOptions
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.types import HardState

Contents = dict[int, Any]


def written(
    syncs: int = 4, *, close: bool = True, options: LogOptions = SMALL
) -> tuple[SimulatedFiles, list[Contents]]:
    """A log of so many syncs, and what it held after each of them (and before the first)."""
    files = disk()
    log = Log.open(files, options)
    states: list[Contents] = [{}]
    for number in range(1, syncs + 1):
        log.append(1, HardState(number, 1, 0), entries(number, [number], size=128))
        log.append(2, None, entries(2 * number - 1, [1, 1], group=2))
        log.sync()
        states.append(reopened(files))
    if close:
        log.close()
    return files, states


def opened(files: SimulatedFiles, *, writable: bool = True) -> tuple[Log, Contents]:
    log = Log.open(files, SMALL, writable)
    return log, contents(log)


def shortened(files: SimulatedFiles, size: int) -> SimulatedFiles:
    """The same disk with segment 1, its only one, cut to `size`."""
    cut = disk()
    for name in files.list("log"):
        cut.put(f"log/{name}", files.read(f"log/{name}"))
    cut.cut(SEGMENT(1), size)
    return cut


def test_cut_at_any_byte_of_the_last_two_frames_after_a_power_loss_is_a_torn_tail() -> None:
    files, states = written(3)
    # The mark is not synced: at a power loss it may be as old as the file. No mark at all is the worst of that.
    files.delete(SYNCED)
    ends = frame_ends(files, SEGMENT(1), 1)
    for size in range(ends[-3], ends[-1]):
        kept = sum(end <= size for end in ends) - 2
        cut = shortened(files, size)
        log, found = opened(cut, writable=size % 16 == 0)
        report = log.report
        assert found == states[kept]
        assert report.lost_durable_bytes == 0
        assert report.cut_bytes == size - ends[kept + 1]
        if report.cut_bytes:
            assert (report.cut_path, report.cut_offset) == ("simulated:" + SEGMENT(1), ends[kept + 1])
        if size % 16 == 0:
            log.append(1, None, entries(kept + 1, [9]))
            log.close()
            assert [row["term"] for row in reopened(cut)[1][1]] == [*range(1, kept + 1), 9]


@pytest.mark.parametrize(("close", "step"), [(True, 1), (False, 29)])
def test_cut_at_any_byte_of_what_was_synced_is_reported_as_lost(close: bool, step: int) -> None:
    files, states = written(3, close=close)
    ends = frame_ends(files, SEGMENT(1), 1)
    for size in range(ends[-3], ends[-1], step):
        kept = sum(end <= size for end in ends) - 2
        cut = shortened(files, size)
        log, found = opened(cut)
        assert found == states[kept]
        assert log.report.lost_durable_bytes == ends[-1] - ends[kept + 1] > 0
        assert log.report.cut_offset == ends[kept + 1]
        log.close()
        # A node that refuses to go on must refuse again when it is simply started anew.
        assert cut.size(SEGMENT(1)) == size
        if size % 29:
            continue
        log, _ = opened(cut)
        assert log.report.lost_durable_bytes > 0
        # Only a write accepts the loss, and then it is over.
        log.append(1, None, entries(kept + 1, [9]))
        log.close()
        log, found = opened(cut)
        assert log.report.lost_durable_bytes == log.report.cut_bytes == 0
        assert len(found[1][1]) == kept + 1
        log.close()


def test_mark_of_lost_bytes_does_not_come_back() -> None:
    for seed in range(20):
        files, _ = written(3)
        cut = SimulatedFiles(SystemRandom(seed))
        for name in files.list("log"):
            cut.put(f"log/{name}", files.read(f"log/{name}"))
        cut.cut(SEGMENT(1), frame_ends(files, SEGMENT(1), 1)[-2] + seed)
        log = Log.open(cut, SMALL)
        log.append(1, None, entries(3, [9]))
        log.sync()
        cut.crash()
        log, found = opened(cut)
        assert log.report.lost_durable_bytes == 0
        assert [row["term"] for row in found[1][1]] == [1, 2, 9]
        log.append(1, None, entries(4, [9]))
        log.sync()
        # One slot of the mark goes bad; the other one must not speak of what was given up.
        for bit in (8 * 20, 8 * 84):
            cut.flip_bit(SYNCED, bit)
            assert len(reopened(cut)[1][1]) == 4
            cut.flip_bit(SYNCED, bit)


@pytest.mark.parametrize("syncs", [3, 4])  # so that the mark has been in either slot
def test_power_lost_at_every_operation_while_a_loss_is_accepted(syncs: int) -> None:
    files, states = written(syncs)
    end, lost = frame_ends(files, SEGMENT(1), 1)[-2:]
    for seed in range(20):
        for operation in range(1, 10):
            cut = SimulatedFiles(SystemRandom(seed))
            for name in files.list("log"):
                cut.put(f"log/{name}", files.read(f"log/{name}"))
            cut.cut(SEGMENT(1), end + 100)
            log = Log.open(cut, SMALL)
            log.append(1, None, entries(syncs, [9]))
            cut.lose_power_at = cut.operations + operation
            with contextlib.suppress(DiskCrash):
                log.sync()
            slots = cut.read(SYNCED) if cut.exists(SYNCED) else b""
            marks = {mark.offset for at in (0, 64) if (mark := segment_module.Mark.unpack(slots[at : at + 64]))}
            assert not {end, lost} <= marks, "the mark of what was lost stands beside a new one"
            cut.crash()
            log, found = opened(cut)
            if len(found[1][1]) < syncs:
                assert found == states[syncs - 1]
            elif log.report.lost_durable_bytes:
                raise AssertionError("a loss is reported that a later write had made good")


def test_loss_of_the_last_segment_s_header_is_reported_and_mended() -> None:
    files, _ = written(10)
    number = len([name for name in files.list("log") if name != "SYNCED"])
    assert number > 2
    for size in (0, 1, 767):
        cut = files.copy()
        cut.cut(SEGMENT(number), size)
        log, found = opened(cut)
        assert log.report.lost_durable_bytes > 0
        last = len(found[1][1])
        log.append(1, None, entries(last + 1, [99]))
        log.close()
        assert [row["term"] for row in reopened(cut)[1][1]] == [*range(1, last + 1), 99]
        cut.crash()
        assert len(reopened(cut)[1][1]) == last + 1


@pytest.mark.parametrize(("close", "step"), [(True, 1), (False, 23)])
def test_one_flipped_bit_anywhere_is_never_silent(close: bool, step: int) -> None:
    files, states = written(5, close=close)
    names = files.list("log")
    assert len(names) > 2, "several segments"
    random = SystemRandom(7)
    end = frame_ends(files, f"log/{names[-2]}", len(names) - 1)[-1]
    for name in names:
        path = f"log/{name}"
        for byte in range(0, files.size(path), step):
            bit = 8 * byte + random.randrange(0, 8)
            files.flip_bit(path, bit)
            if name == "SYNCED":
                # The mark is no part of the log: without it there is one witness less, and nothing else changes.
                assert reopened(files) == states[-1]
            elif name == names[-2] and byte >= end:
                # Nobody reads what is in the room of a process that was killed.
                assert reopened(files) == states[-1]
            else:
                with pytest.raises(CorruptionError) as caught:
                    Log.open(files, SMALL, writable=False)
                assert caught.value.path == f"simulated:{path}"
                assert caught.value.offset is not None
                assert caught.value.offset <= byte
            files.flip_bit(path, bit)
    assert reopened(files) == states[-1]


def test_every_bit_of_the_last_frame_counts() -> None:
    files, _ = written(2)
    start, end = frame_ends(files, SEGMENT(1), 1)[-2:]
    # All bits of the metadata, where lengths are; of the body, the test above has tried one in each byte.
    for bit in range(8 * start, 8 * min(end, start + 768)):
        files.flip_bit(SEGMENT(1), bit)
        with pytest.raises(CorruptionError) as caught:
            Log.open(files, SMALL)
        assert caught.value.offset == start
        files.flip_bit(SEGMENT(1), bit)


def test_damage_is_found_without_the_mark_where_a_later_write_proves_it() -> None:
    files, _ = written(3)
    files.delete(SYNCED)
    ends = frame_ends(files, SEGMENT(1), 1)
    for at in (0, *ends[1:3]):
        damaged = files.copy()
        damaged.flip_bit(SEGMENT(1), 8 * (at + 700))
        with pytest.raises(CorruptionError, match="sound frames behind it") as caught:
            Log.open(damaged, SMALL)
        assert caught.value.offset == at
    # Nothing proves that the last write had ended: without the mark it counts as torn.
    files.flip_bit(SEGMENT(1), 8 * (ends[-2] + 700))
    log, found = opened(files)
    assert log.report.cut_bytes == ends[-1] - ends[-2]
    assert len(found[1][1]) == 2


def test_writer_that_died_between_write_and_sync_leaves_frames_that_count() -> None:
    files, states = written(3, close=False)
    before = files.copy()
    log = Log.open(files, SMALL)
    log.append(1, None, entries(4, [9]))
    files.sync_node = lambda path, node: None  # type: ignore[method-assign]
    log.sync()
    log.close()
    del files.sync_node  # type: ignore[method-assign]
    files.put(SYNCED, before.read(SYNCED))
    log, found = opened(files)
    assert len(found[1][1]) == 4
    # What it has shown it stands by: a power loss right now takes nothing back.
    files.crash()
    assert reopened(files) == found != states[3]


def test_torn_write_of_several_frames_is_cut_although_later_frames_of_it_are_sound() -> None:
    options = LogOptions(frame_bytes_max=1 << 20)
    files = disk()
    log = Log.open(files, options)
    log.append(1, None, entries(1, [1]))
    log.sync()
    mark, synced_end = files.read(SYNCED), log.nbytes
    log.append(1, None, entries(2, [1] * 30, size=100_000))
    log.sync()
    files.put(SYNCED, mark)
    ends = frame_ends(files, SEGMENT(1), 1)
    assert len(ends) > 5
    for torn in (2, 3):
        copy = files.copy()
        copy.flip_bit(SEGMENT(1), 8 * (ends[torn] + 5000))
        log = Log.open(copy, options)
        assert log.report.cut_offset == ends[torn]
        assert log.last_index(1) >= 1
        log.close()
        assert copy.size(SEGMENT(1)) == ends[torn]
    assert ends[2] == synced_end
    # One more write proves that the whole of it had been durable.
    log = Log.open(files, options)
    log.append(1, None, entries(32, [1]))
    log.close()
    files.delete(SYNCED)
    files.flip_bit(SEGMENT(1), 8 * (ends[2] + 5000))
    with pytest.raises(CorruptionError):
        Log.open(files, options)


def test_payload_that_looks_like_a_log_does_not_fool_the_search() -> None:
    """Somebody stores a copy of a log in a table; then that very write is torn."""
    files, _ = written(1)
    log = Log.open(files, SMALL)
    mark, end = files.read(SYNCED), files.size(SEGMENT(1))
    copied = files.read(SEGMENT(1))
    # One copy as it is, and seals by the thousand that claim to start right before themselves.
    forged = b"".join(
        b"marble-seal:" + f"{2**20:016x}{1:016x}{end + 64 * i:016x}{end + 1:016x}".encode() + b"0" * 32
        for i in range(2000)
    )
    batch = entries(2, [9, 9], size=64)
    at = batch.schema.get_field_index("payload")
    batch = batch.set_column(at, batch.schema.field(at), pa.array([copied, forged], pa.binary()))
    log.append(1, None, batch)
    log.sync()
    files.put(SYNCED, mark)
    files.flip_bit(SEGMENT(1), 8 * (end + 766))
    size = files.size(SEGMENT(1))
    log = Log.open(files, SMALL)
    assert (log.report.cut_offset, log.report.cut_bytes) == (end, size - end)


def test_search_that_does_not_end_cuts_nothing() -> None:
    files, _ = written(3)
    files.delete(SYNCED)
    start = frame_ends(files, SEGMENT(1), 1)[-2]
    data = files.read(SEGMENT(1))[:start]
    size = 1 << 20
    seals = b"".join(
        f"marble-seal:{size:016x}{1:016x}{start + 128 * i:016x}".encode().rjust(68, b"\xff").ljust(128, b"0")
        for i in range(1, size // 128)
    )
    files.put(SEGMENT(1), data + bytes(128) + seals)
    with pytest.raises(CorruptionError):
        Log.open(files, SMALL)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_missing_segment_is_damage(missing: int) -> None:
    files, _ = written(9)
    assert len([name for name in files.list("log") if name != "SYNCED"]) == 3
    files.delete(SEGMENT(missing))
    with pytest.raises(CorruptionError, match="missing") as caught:
        Log.open(files, SMALL)
    assert caught.value.path == "simulated:" + SEGMENT(missing)


def test_shortened_segment_that_is_not_the_last_is_damage() -> None:
    files, _ = written(9)
    for size in (files.size(SEGMENT(1)) - 1, frame_ends(files, SEGMENT(1), 1)[-2], 0):
        cut = files.copy()
        cut.cut(SEGMENT(1), size)
        with pytest.raises(CorruptionError):
            Log.open(cut, SMALL)


def test_segment_of_another_log_is_damage() -> None:
    files, _ = written(9)
    other = disk()
    log = Log.open(other, SMALL)
    for first in range(1, 20):
        log.append(1, None, entries(first, [1], size=500))
        log.sync()
    log.close()
    files.put(SEGMENT(2), other.read(SEGMENT(2)))
    with pytest.raises(CorruptionError, match="does not follow") as caught:
        Log.open(files, SMALL)
    assert (caught.value.path, caught.value.offset) == ("simulated:" + SEGMENT(2), 0)


def test_older_state_of_the_last_segment_is_not_the_synced_one() -> None:
    """A disk that loses whole writes, or an operator who puts an old copy back."""
    files, _ = written(2)
    old = files.read(SEGMENT(1))
    log = Log.open(files, SMALL)
    log.append(1, None, entries(3, [7]))
    log.close()
    other = disk()
    other.put(SEGMENT(1), old)
    log = Log.open(other, SMALL)
    log.append(1, None, entries(3, [8]))
    log.close()
    assert other.size(SEGMENT(1)) == files.size(SEGMENT(1))
    files.put(SEGMENT(1), other.read(SEGMENT(1)))
    with pytest.raises(CorruptionError, match="not the one that was synced"):
        Log.open(files, SMALL)


def test_torn_header_of_a_segment_that_was_just_started_is_made_anew() -> None:
    files, states = written(3)
    header = frame.encode_header("1", 2, 1)[0].to_pybytes()
    for size in (0, 1, 64, 767):
        torn = files.copy()
        torn.put(SEGMENT(2), header[:size])
        log, found = opened(torn)
        assert found == states[3]
        assert log.report.cut_bytes == size
        assert log.report.lost_durable_bytes == 0
        log.append(1, None, entries(4, [9]))
        log.close()
        assert len(reopened(torn)[1][1]) == 4
    # The file was started only because everything before it was durable: damage there is no torn tail.
    files.put(SEGMENT(2), b"")
    files.delete(SYNCED)
    files.flip_bit(SEGMENT(1), 8 * (files.size(SEGMENT(1)) - 1))
    with pytest.raises(CorruptionError, match="had been complete"):
        Log.open(files, SMALL)


def test_other_format_is_named() -> None:
    files = disk()
    files.put(SEGMENT(1), frame.encode_header("2", 1, 0)[0].to_pybytes())
    with pytest.raises(CorruptionError, match="format 2, this marble reads format 1"):
        Log.open(files)


def test_sound_frames_that_contradict_each_other_are_damage() -> None:
    for states, batches, words in (
        ([(1, 1, 0, 0)], [(entries(5, [1]), 0, 1)], "gap"),
        ([(1, 2, 1, 0), (1, 1, 1, 0)], [], "went back"),
        ([(1, 2, 1, 0), (1, 2, 3, 0)], [], "vote"),
        ([], [(entries(1, [3]), 0, 1), (entries(2, [2], mark=1), 0, 1)], "term"),
    ):
        header, chain = frame.encode_header("1", 1, 0)
        data = frame.encode(states, batches, 1, header.size, header.size, chain)[0]
        files = disk()
        files.put(SEGMENT(1), header.to_pybytes() + data.to_pybytes())
        with pytest.raises(CorruptionError, match=words) as caught:
            Log.open(files)
        assert caught.value.offset == header.size


def test_commit_index_that_outlived_its_entries_is_lowered() -> None:
    files = disk()
    log = Log.open(files, LogOptions(frame_bytes_max=1 << 20))
    log.append(1, HardState(1, 1, 20), entries(1, [1] * 20, size=100_000))
    log.sync()
    files.delete(SYNCED)
    files.cut(SEGMENT(1), frame_ends(files, SEGMENT(1), 1)[2])
    log = Log.open(files)
    state = log.groups[1]
    assert state.hard_state == HardState(1, 1, state.last_index)
    assert 0 < state.last_index < 20
    log.append(1, None, entries(state.last_index + 1, [1]))
    log.close()


def test_leftovers_and_foreign_files_do_no_harm() -> None:
    files, states = written(3)
    files.put(SEGMENT(1) + ".tmp", b"half a segment")
    files.put("log/notes.txt", b"hello")
    files.put("log/1.arrows", b"not a name of ours")
    assert reopened(files, writable=True) == states[3]
    assert not files.exists(SEGMENT(1) + ".tmp")
    assert files.exists("log/notes.txt")


def test_frames_larger_than_the_window_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files, states = written(4)
    monkeypatch.setattr(segment_module.Window.__init__, "__defaults__", (256,))
    assert reopened(files) == states[4]
    monkeypatch.setattr(segment_module.Window.__init__, "__defaults__", (1500,))
    assert reopened(files) == states[4]
    files.delete(SYNCED)
    files.flip_bit(SEGMENT(1), 8 * 1000)
    with pytest.raises(CorruptionError, match="sound frames behind it"):
        Log.open(files, SMALL)


def test_mark_survives_a_torn_write_of_itself() -> None:
    files, _ = written(3, close=False)
    log = Log.open(files, SMALL)
    old, new = segment_module.read_mark(files), files.read(SYNCED)
    assert old is not None
    log.append(1, None, entries(4, [9]))
    before = files.read(SYNCED)
    log.sync()
    after = files.read(SYNCED)
    assert new == before != after
    for size in range(129):
        for torn in (after[:size] + before[size:], before[:size] + after[size:]):
            files.put(SYNCED, torn)
            mark = segment_module.read_mark(files)
            assert mark is not None
            assert mark.count in (old.count, old.count + 1)
    files.put(SYNCED, b"")
    assert segment_module.read_mark(files) is None
