"""Files that are written beside the log: what one sync covers is bounded, and nothing is left unsynced."""

from __future__ import annotations

import pyarrow as pa
import pytest

from marble.writing import SYNC_BYTES, write_paced


class Syncs:
    """An `AppendFile` that notes what each sync covers."""

    def __init__(self) -> None:
        self.content = b""
        self.writes: list[int] = []
        self.synced: list[int] = []

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def room(self) -> int:
        return 0

    def write(self, data: bytes | memoryview, zeros: int = 0) -> None:
        self.content += bytes(data)
        self.writes.append(len(data))

    def sync(self) -> None:
        self.synced.append(len(self.content) - sum(self.synced))

    def close(self) -> None:
        raise AssertionError("who made the file closes it")


@pytest.mark.parametrize("sync_bytes", [1, 7, 64, 1000, SYNC_BYTES])
def test_a_sync_covers_no_more_than_it_may(sync_bytes: int) -> None:
    """One write for each sync, whatever pieces the bytes come in: pages are as large as the writes that made them."""
    pieces: list[bytes | memoryview | pa.Buffer] = [b"a" * 5, b"", memoryview(b"b" * 64), pa.py_buffer(b"c" * 131)]
    file, paces = Syncs(), list[int]()
    write_paced(file, pieces, paces.append, sync_bytes)
    total = 200
    full, rest = divmod(total, sync_bytes)
    assert file.content == b"".join(bytes(memoryview(piece)) for piece in pieces)
    assert file.synced == file.writes == paces == [sync_bytes] * full + [rest] * bool(rest)


def test_nothing_is_not_synced() -> None:
    file = Syncs()
    write_paced(file, [b"", b""], None)
    assert (file.synced, file.writes) == ([], [])


def test_who_paces_may_give_up() -> None:
    """What was handed to it is synced by then, and no more is written."""
    file = Syncs()

    def give_up(nbytes: int) -> None:
        raise RuntimeError(f"{nbytes} bytes are enough")

    with pytest.raises(RuntimeError, match="4 bytes are enough"):
        write_paced(file, [b"abcdefgh"], give_up, 4)
    assert file.content == b"abcd"
    assert file.synced == [4]
