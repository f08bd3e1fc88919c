"""How the demo shows itself: a live bar on a terminal, plain lines anywhere else.

Rule 1: what is shown was measured or answered by a node; a display invents nothing. Both displays say the same words.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TextIO

from marble.errors import check

_PLAIN_STEPS: Final = 10
"""Lines that a plain display spends on one bar."""


class Display(Protocol):
    """What the scenario tells its audience. One thread at a time."""

    def say(self, text: str) -> None:
        """A line about something that happened."""
        ...

    def begin(self, total_rows: int, leader: str) -> None:
        """Show progress towards `total_rows`, and who leads, until `end`."""
        ...

    def advance(self, rows: int, leader: str) -> None:
        """`rows` are done in all."""
        ...

    def end(self) -> None:
        """Take the bar away. Idempotent."""
        ...

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """A table of what was measured."""
        ...

    def verdict(self, good: bool, text: str) -> None:
        """The last line."""
        ...


class PlainDisplay:
    """Lines of text, for a log, a pipe, or where ``rich`` is not installed."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._total = 0
        self._shown = 0
        self._begun_s = 0.0

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def begin(self, total_rows: int, leader: str) -> None:
        self._total, self._shown, self._begun_s = total_rows, 0, self._clock()
        self.say(f"writing {total_rows:,} rows, {leader}")

    def advance(self, rows: int, leader: str) -> None:
        step = rows * _PLAIN_STEPS // self._total
        if step > self._shown:
            self._shown = step
            rate = rows / max(self._clock() - self._begun_s, 1e-9)
            self.say(f"  {rows * 100 // self._total:3d} %  {rows:,} rows  {rate:,.0f} rows/s  {leader}")

    def end(self) -> None:
        self._shown = 0

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        width = max(len(name) for name, _ in rows)
        self.say("")
        for name, value in rows:
            self.say(f"  {name:<{width}}  {value}")
        self.say("")

    def verdict(self, good: bool, text: str) -> None:
        self.say(f"{'PASSED' if good else 'FAILED'}: {text}")


class RichDisplay:
    """A live bar with rate and leader, for a terminal. Needs ``rich``."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        self._console = Console(file=out, highlight=False)
        self._make: Callable[[], Progress] = lambda: Progress(
            TextColumn("  writing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("[bold]{task.fields[leader]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._begun_s = 0.0

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def begin(self, total_rows: int, leader: str) -> None:
        self._begun_s = time.monotonic()
        self._progress = self._make()
        self._task = self._progress.add_task("rows", total=total_rows, rate="", leader=leader)
        self._progress.start()

    def advance(self, rows: int, leader: str) -> None:
        progress, task = self._progress, self._task
        check(progress is not None and task is not None, "advance before begin")
        if progress is not None and task is not None:
            rate = rows / max(time.monotonic() - self._begun_s, 1e-9)
            progress.update(task, completed=rows, rate=f"{rate:,.0f} rows/s", leader=leader)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table

        table = Table(show_header=False)
        for name, value in rows:
            table.add_row(name, value)
        self._console.print(table, markup=False)

    def verdict(self, good: bool, text: str) -> None:
        word, style = ("PASSED", "bold green") if good else ("FAILED", "bold red")
        self._console.print(f"{word}: {text}", style=style, markup=False)


def choose_display(out: TextIO = sys.stdout) -> Display:
    """A live display on a terminal, a plain one elsewhere or where ``rich`` is missing (which it says)."""
    if not out.isatty():
        return PlainDisplay(out)
    if importlib.util.find_spec("rich") is None:
        display = PlainDisplay(out)
        display.say("(for a live progress bar: pip install 'marbledb[demo]')")
        return display
    return RichDisplay(out)
