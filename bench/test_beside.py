"""The scripts that measure writes run, once and small. What they find is read by people: `report.py`, `beside.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import report
from beside import log_beside
from work import WRITES, Shape


@pytest.mark.parametrize("sync_bytes", [None, 1 << 20])
def test_log_beside_a_file(tmp_path: Path, sync_bytes: int | None) -> None:
    took = log_beside(tmp_path, 4096, sync_bytes, False, 2 << 20)
    assert took
    assert min(took) > 0
    assert (tmp_path / "file").exists() == (sync_bytes is not None)


def test_writes_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each store writes everything in each way, and between its turn and the next no file goes."""
    turns: list[int] = []
    monkeypatch.setattr(report, "settle", lambda shape: turns.append(len(list(tmp_path.glob("*/*")))))
    rounds, shape = 2, Shape(2000)
    lines = report.writes(shape, tmp_path, rounds)
    assert [name for name, _, _ in lines] == [write.name for write in WRITES]
    stores = len(lines[0][1])
    assert all(len(best) == stores and min(best.values()) > 0 for _, best, _ in lines)
    assert turns == list(range(1, stores * rounds + 1)) * len(WRITES)
    assert list(tmp_path.iterdir()) == []


def test_backed_memory_is_given_back() -> None:
    report.back_memory(0)
    report.back_memory(3 << 20)
