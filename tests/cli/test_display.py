"""Both displays say the same things; which one is shown depends on where the output goes."""

from __future__ import annotations

import io
import itertools

import pytest

from marble.demo.display import Display, PlainDisplay, RichDisplay, choose_display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell(display: Display) -> None:
    display.say("node [1]: process 7")
    display.begin(1000, "leader node 1")
    for rows in range(50, 1001, 50):
        display.advance(rows, "leader node 1" if rows < 500 else "no leader")
    display.end()
    display.end()
    display.summary([("rate", "5 rows/s"), ("write latency", "p50 1 ms")])
    display.verdict(True, "1,000 rows")
    display.verdict(False, "node 2: [2] rows are missing")


def test_a_plain_display_gives_ten_lines_of_progress() -> None:
    out = io.StringIO()
    ticks = itertools.count()
    tell(PlainDisplay(out, lambda: float(next(ticks))))
    lines = out.getvalue().splitlines()
    assert lines[:3] == [
        "node [1]: process 7",
        "writing 1,000 rows, leader node 1",
        "   10 %  100 rows  100 rows/s  leader node 1",
    ]
    assert sum("%" in line for line in lines) == 10
    assert lines[11].startswith("  100 %  1,000 rows")
    assert lines[11].endswith("no leader")
    assert "  rate           5 rows/s" in lines
    assert "  write latency  p50 1 ms" in lines
    assert lines[-2:] == ["PASSED: 1,000 rows", "FAILED: node 2: [2] rows are missing"]


def test_a_rich_display_says_the_same() -> None:
    out = Terminal()
    tell(RichDisplay(out))
    text = out.getvalue()
    for words in (
        "node [1]: process 7",
        "1000/1000",
        "rows/s",
        "no leader",
        "p50 1 ms",
        "PASSED: 1,000 rows",
        "FAILED: node 2: [2] rows",
    ):
        assert words in text


def test_the_display_fits_where_the_output_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_display(io.StringIO()), PlainDisplay)
    assert isinstance(choose_display(Terminal()), RichDisplay)
    monkeypatch.setattr("marble.demo.display.importlib.util.find_spec", lambda name: None)
    out = Terminal()
    assert isinstance(choose_display(out), PlainDisplay)
    assert "pip install 'marbledb[demo]'" in out.getvalue()
