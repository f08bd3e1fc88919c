"""Reading a log front to back, and the judgement over every byte that is not as it should be.

Rule 1: whether odd bytes are a torn tail (cut) or damage (`CorruptionError`) is decided here and nowhere else.
Rule 2: nothing here writes.

What is evidence that bytes had been durable, so that a crash cannot explain their state:

- the mark (`marble.logstore.segment.Mark`) lies behind them;
- a later segment exists: it is created only when all before it is durable;
- the segments before it are gone: they are purged only when what makes them superfluous is durable, which begins with
  the opening of the segment behind them;
- a sound frame lies behind them whose ``synced`` is greater than their offset: its writer knew them durable.
  A sound frame behind them alone is no such evidence: the blocks of one write reach the disk in any order.

Bytes that evidence covers and that are wrong are damage. Bytes that it covers and that are no longer there, because the
last segment ends before them, are lost: reported as such, and for the node to decide. All else is a torn tail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from marble._core import frame
from marble.env import Files
from marble.errors import CorruptionError, InvariantError
from marble.logstore.segment import FORMAT, Mark, Window, read_mark, segment_numbers, segment_path
from marble.schema import ENTRY_SCHEMA

_SEARCH_WORK_FACTOR: Final = 16
"""The search for frames behind a bad one hashes no more than so many times the bytes searched. Without a bound, a
payload full of counterfeit seals could make it hash for ever."""


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What was found when the log was opened.

    - ``cut_path`` is None unless a tail was cut: ``cut_bytes`` from ``cut_offset`` on (``cut_bytes`` is 0 if the file
      ends at a frame's end but had been longer).
    - ``lost_durable_bytes > 0``: bytes that this node had known to be durable are gone. With peers it must not go on:
      it may have promised a vote or an entry that it no longer remembers. Nothing is changed on disk before the first
      `Log.sync`.
    """

    segments: int = 0
    frames: int = 0
    bytes: int = 0
    cut_path: str | None = None
    cut_offset: int = 0
    cut_bytes: int = 0
    lost_durable_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ScannedFrame:
    """One sound frame: where it stands and what is in it. ``base``: it opens its segment (see `marble.logstore.repair`)."""

    segment: int
    offset: int
    seal: frame.Seal
    batch: pa.RecordBatch
    base: bool = False


@dataclass(slots=True)
class Tail:
    """Where the log ends, once it was scanned: the last segment, its sound part ``[0, end)``, and the seal that ends
    it.

    ``end`` is 0 if the segment has no sound opening, which takes ``[0, opening)``. Evidence says that ``[0, durable)``
    reached the disk. ``size`` is that of the file, of whose bytes behind ``end`` ``torn`` are no room.
    """

    segment: int = 0
    end: int = 0
    size: int = 0
    chain: int = 0
    durable: int = 0
    opening: int = 0
    torn: int = 0


class Scan:
    """One pass over a log. Iterate `frames` to its end, then look at `report` and `tail`.

    Parameters
    ----------
    files
        The node's files.
    """

    def __init__(self, files: Files) -> None:
        self.mark: Mark | None = read_mark(files)
        self.report = RecoveryReport()
        self.tail = Tail()
        self.first_segment = 1
        self.sealed: dict[int, int] = {}
        """Segment -> its bytes, of all segments but the last."""
        self._files = files
        self._frames = 0

    def frames(self) -> Iterator[ScannedFrame]:
        """All frames but headers, in order.

        Raises
        ------
        CorruptionError
            Damage, with the path and the offset of the frame where it starts.
        """
        numbers = segment_numbers(self._files)
        self._check_numbers(numbers)
        self.first_segment = numbers[0] if numbers else 1
        # What came before a first segment that is not number 1 has been purged, and with it what its header follows.
        chain = 0 if self.first_segment == 1 else None
        for number in numbers:
            is_last = number == numbers[-1]
            path = segment_path(number)
            window = Window(self._files, path, self._files.size(path))
            self.tail = Tail(number, 0, window.size, chain or 0)
            header = self._header(window, number, chain)
            base = None
            if header is not None and number > 1:
                base = self._frame(window, number, header.length, header.checksum, base=True)
            if header is None or (number > 1 and base is None):
                # The opening is written in one piece, so a torn one is made anew as a whole.
                self._judge(window, number, 0 if header is None else header.length, is_last)
                self.tail.torn = window.size
                break
            self._advance(header)
            if base is not None:
                self._advance(base.seal)
                yield base
            self.tail.opening = self.tail.end
            yield from self._segment(window, number, is_last)
            chain = self.tail.chain
            if not is_last:
                self.sealed[number] = self.tail.end
        self._finish(numbers)

    def _segment(self, window: Window, number: int, is_last: bool) -> Iterator[ScannedFrame]:
        tail = self.tail
        while tail.end < window.size:
            scanned = self._frame(window, number, tail.end, tail.chain)
            if scanned is None:
                try:
                    self._judge(window, number, tail.end, is_last)
                except CorruptionError:
                    # What was read of the room of a log that is being written may be older than the evidence.
                    window.forget()
                    if not is_last or window.find_frame(number, tail.end) is None:
                        raise
                    continue
                tail.torn = 0 if window.has_room(tail.end) else window.size - tail.end
                return
            self._advance(scanned.seal)
            yield scanned

    def _frame(
        self, window: Window, number: int, offset: int, chain: int, *, base: bool = False
    ) -> ScannedFrame | None:
        """The frame that follows the one sealed with `chain`; None if there is no sound one."""
        seal = window.find_frame(number, offset)
        if seal is None:
            return None
        if seal.chain != chain or seal.synced > offset:
            raise self._damage(number, offset, "a frame does not follow the one before it")
        data, at = window.view(offset, seal.length)
        try:
            batch = frame.decode(data, at, seal)
        except (CorruptionError, InvariantError) as error:
            raise self._damage(number, offset, str(error)) from None
        self._frames += 1
        return ScannedFrame(number, offset, seal, batch, base)

    def _advance(self, seal: frame.Seal) -> None:
        """Take a sound frame in. The mark was made at the end of a frame, so it must be met exactly, with the same
        seal."""
        tail, mark = self.tail, self.mark
        start, tail.end, tail.chain = tail.end, tail.end + seal.length, seal.checksum
        tail.durable = max(tail.durable, seal.synced)
        if mark is None or mark.segment != tail.segment or mark.offset <= start or mark.offset > tail.end:
            return
        if mark.offset != tail.end or mark.chain != tail.chain:
            raise self._damage(tail.segment, start, "a frame is not the one that was synced here")
        tail.durable = tail.end

    def _header(self, window: Window, number: int, chain: int | None) -> frame.Seal | None:
        path = segment_path(number)
        seal = window.find_frame(number, 0, frame.METADATA_BYTES_MAX)
        if seal is None:
            return None
        if chain is not None and seal.chain != chain:
            raise self._damage(number, 0, "the segment does not follow the one before it, which may have lost its end")
        data, at = window.view(0, seal.length)
        try:
            schema = pa.ipc.read_schema(pa.py_buffer(data[at : at + seal.length]))
            found = ascii((schema.metadata or {}).get(b"marble.format", b"?").decode(errors="replace"))[1:-1]
            names = ascii(", ".join(schema.names))[1:-1]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._damage(number, 0, f"its header is sealed and holds no schema ({error})") from None
        if found != FORMAT:
            where = self._files.describe(path)
            raise CorruptionError(
                f"the log has format {found}, this marble reads format {FORMAT}: use its marble", where, 0
            )
        if not schema.equals(ENTRY_SCHEMA):
            # Versions before the first release changed the columns and kept the number of the format.
            where = self._files.describe(path)
            raise CorruptionError(
                f"the log has the columns {names}, this marble reads {', '.join(ENTRY_SCHEMA.names)}: use the marble "
                "that wrote it",
                where,
                0,
            )
        return seal

    def _check_numbers(self, numbers: list[int]) -> None:
        for expected, number in enumerate(numbers, start=numbers[0] if numbers else 1):
            if number != expected:
                raise self._damage(expected, 0, "a segment is missing")
        if self.mark is not None and self.mark.segment > (numbers[-1] if numbers else 0):
            raise self._damage(self.mark.segment, 0, "a segment that had been synced is missing")

    def _judge(self, window: Window, number: int, offset: int, is_last: bool) -> None:
        """The bytes from `offset` on are no sound frame: return if they are a tail that may be cut, else raise."""
        if not is_last:
            raise self._damage(number, offset, "damage in a segment that had been complete")
        if number == self.first_segment > 1 and self.tail.end == 0:
            raise self._damage(number, offset, "damage in a segment for which the ones before it were purged")
        mark = self.mark
        if mark is not None and mark.segment == number and offset < mark.offset <= window.size:
            raise self._damage(number, offset, "damage in a part of the log that had been synced")
        if self._finds_witness(window, number, offset):
            raise self._damage(number, offset, "damage with sound frames behind it")

    def _finds_witness(self, window: Window, number: int, offset: int) -> bool:
        """Whether a sound frame lies behind `offset` whose writer knew the byte at `offset` to be durable.

        Every seal tells where its frame starts, so there is one candidate for each place that looks like a seal. When
        there are so many counterfeits that the search would not end, the answer is yes, which is the safe one:
        nothing is cut.
        """
        work_left = _SEARCH_WORK_FACTOR * (window.size - offset)
        position = offset
        while (seal_at := window.find(frame.SEAL_MAGIC, position)) is not None:
            position = seal_at + 1
            data, at = window.view(seal_at, frame.SEAL_BYTES)
            try:
                length, named, start = (int(data[i : i + 16], 16) for i in (at + 12, at + 28, at + 44))
            except ValueError:
                continue
            if named != number or not offset < start < seal_at <= start + frame.METADATA_BYTES_MAX:
                continue
            work_left -= min(length, window.size - start)
            if work_left < 0:
                return True
            seal = window.find_frame(number, start)
            if seal is not None and seal.synced > offset:
                return True
        return False

    def _finish(self, numbers: list[int]) -> None:
        tail, mark = self.tail, self.mark
        lost = 0
        if mark is not None and mark.segment == tail.segment and mark.offset > tail.end:
            lost = mark.offset - tail.end
        cut = lost > 0 or tail.torn > 0
        self.report = RecoveryReport(
            segments=len(numbers),
            frames=self._frames,
            bytes=sum(self.sealed.values()) + tail.end,
            cut_path=self._files.describe(segment_path(tail.segment)) if cut else None,
            cut_offset=tail.end if cut else 0,
            cut_bytes=tail.torn,
            lost_durable_bytes=lost,
        )

    def _damage(self, number: int, offset: int, what: str) -> CorruptionError:
        advice = "this node must not go on with this log; keep its files as they are"
        return CorruptionError(f"{what}: {advice}", self._files.describe(segment_path(number)), offset)
