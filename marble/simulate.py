"""``marble simulate``: play many histories of a simulated cluster, and show the one that breaks.

Rule 1: which histories are played depends on the arguments alone, never on how many processes share them or how fast they are. Only
        ``--minutes`` looks at a clock, and only to stop.
Rule 2: a history that breaks is shown with all that is needed to play it again: plan, seed and steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from marble.errors import UsageError
from marble.testing.cluster import Report, simulate
from marble.testing.plan import PLANS, SWARM, SWARM_FILES, plan_for

SEEDS: Final = 100
_PROGRESS_S: Final = 5.0
"""How often a line of progress appears where there is no terminal."""
_NODES_MAX: Final = 9


@dataclass(frozen=True, slots=True)
class Task:
    """One history to play."""

    plan: str
    seed: int
    steps: int
    nodes: int

    @property
    def command(self) -> str:
        """What plays it again."""
        nodes = f" --nodes {self.nodes}" if self.nodes else ""
        return f"marble simulate --plan {self.plan} --first-seed {self.seed} --seeds 1 --steps {self.steps}{nodes}"


@dataclass(frozen=True, slots=True)
class Played:
    """What became of it: a report, or what broke. ``cpu_s`` is the processor time that it took."""

    task: Task
    report: Report | None
    failure: str
    cpu_s: float


@dataclass(slots=True)
class Totals:
    """All histories together."""

    histories: int = 0
    steps: int = 0
    simulated_us: int = 0
    cpu_s: float = 0.0
    acknowledged: int = 0
    lost: int = 0
    reads: int = 0
    elections: int = 0
    undecided: int = 0
    injected: Counter[str] = field(default_factory=Counter)

    def add(self, played: Played) -> None:
        """Count one history that held."""
        report = played.report
        if report is None:
            return
        self.histories += 1
        self.cpu_s += played.cpu_s
        self.injected.update(report.injected)
        for name in ("steps", "simulated_us", "acknowledged", "lost", "reads", "elections", "undecided"):
            setattr(self, name, getattr(self, name) + getattr(report, name))

    def line(self) -> str:
        """One line of progress."""
        return (
            f"{self.histories} histories, {self.steps:,} steps, {self.simulated_us / 3.6e9:.2f} h simulated, "
            f"{self.elections:,} terms, {sum(self.injected.values()):,} faults"
        )

    def summary(self) -> str:
        """What is worth knowing at the end."""
        rate = self.steps / self.cpu_s if self.cpu_s else 0.0
        lines = [
            f"{self.histories} histories held: {self.steps:,} steps, {rate:,.0f} steps/s of one core ({rate * 60 / 1e6:.2f} M a minute), "
            f"{self.simulated_us / 3.6e9:.2f} h simulated",
            f"{self.acknowledged:,} operations answered, {self.lost:,} given up, {self.reads:,} reads confirmed, "
            f"{self.elections:,} terms led",
        ]
        if self.undecided:
            lines.append(f"{self.undecided} histories were too tangled for the linearizability checker")
        lines.extend(f"  {kind:<26}{count:>12,}" for kind, count in sorted(self.injected.items()))
        return "\n".join(lines)


def run(options: argparse.Namespace) -> bool:
    """Play what `options` ask for and tell about it. False if a history broke.

    Raises
    ------
    UsageError
        An option is out of bounds, or names a plan that there is not.
    """
    _check(options)
    totals = Totals()
    deadline = None if options.minutes is None else time.monotonic() + options.minutes * 60
    with _display(options.seeds) as display:
        for played in _play_all(_tasks(options), options.jobs, deadline):
            if played.report is None:
                display.close()
                print(played.failure)
                print(f"\nplay it again: {played.task.command}")
                return False
            totals.add(played)
            display.show(totals)
    print(totals.summary())
    return True


def _check(options: argparse.Namespace) -> None:
    for name, low, high in (
        ("seeds", 1, None),
        ("steps", 1, None),
        ("jobs", 1, 256),
        ("first_seed", 0, None),
        ("nodes", 0, _NODES_MAX),
    ):
        value = getattr(options, name)
        if value is not None and (value < low or (high is not None and value > high)):
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: there must be {low} or more" + (f", up to {high}" if high else "")
            )
    if options.minutes is not None and not options.minutes > 0:
        raise UsageError(f"--minutes {options.minutes}: there must be more than 0")
    if options.plan != "all":
        plan_for(options.plan, 1)


def _tasks(options: argparse.Namespace) -> Iterator[Task]:
    """The histories in order; without an end if only the time is limited."""
    plans = [SWARM, SWARM_FILES, *PLANS] if options.plan == "all" else [options.plan]
    count = options.seeds if options.seeds is not None or options.minutes is not None else SEEDS
    seeds = (
        itertools.count(options.first_seed) if count is None else range(options.first_seed, options.first_seed + count)
    )
    for seed in seeds:
        yield Task(plans[seed % len(plans)], seed, options.steps, options.nodes)


def play(task: Task) -> Played:
    """Play one history. What breaks in it is told, never raised."""
    began = time.process_time()
    try:
        report = simulate(task.plan, task.seed, task.steps, nodes=task.nodes)
    except Exception as error:
        text = "\n".join([*getattr(error, "__notes__", ()), "", f"{type(error).__name__}: {error}"])
        return Played(task, None, text, time.process_time() - began)
    return Played(task, report, "", time.process_time() - began)


def _play_all(tasks: Iterator[Task], jobs: int, deadline: float | None) -> Iterator[Played]:
    """Play `tasks`, `jobs` at a time, until all are done, one broke, or the deadline has passed."""
    tasks = itertools.takewhile(lambda _: deadline is None or time.monotonic() < deadline, tasks)
    if jobs == 1:
        yield from map(play, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running: set[Future[Played]] = set()
        try:
            for task in tasks:
                running.add(pool.submit(play, task))
                if len(running) >= 2 * jobs:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# -- what is shown meanwhile -------------------------------------------------------------------------------------------


class _Lines(AbstractContextManager["_Lines"]):
    """A line every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _PROGRESS_S

    def show(self, totals: Totals) -> None:
        """Tell how far it is, if it is time to."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PROGRESS_S
            print(totals.line(), flush=True)

    def close(self) -> None:
        """Nothing to give back."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Live(_Lines):
    """A line that changes, on a terminal. Needs ``rich``."""

    def __init__(self, seeds: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        )
        self._task: Any = self._progress.add_task("", total=seeds)
        self._progress.start()

    def show(self, totals: Totals) -> None:
        """Tell how far it is."""
        self._progress.update(self._task, completed=totals.histories, description=totals.line())

    def close(self) -> None:
        """Leave the line as it is."""
        self._progress.stop()


def _display(seeds: int | None) -> _Lines:
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        return _Live(seeds)
    return _Lines()
