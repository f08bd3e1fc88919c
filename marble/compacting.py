"""When the machine of a group compacts its files: whenever it has something to compact, one job at a time.

Rule 1: a compaction that failed changed nothing and is tried again, but not at once: a disk that is full stays so for a
while. What is damaged the machine leaves alone by itself.
"""

from __future__ import annotations

from typing import Final

from marble.errors import check
from marble.jobs import CompactJob
from marble.machine import Pace, StateMachine, StoredMachine

REST_TICKS: Final = 50
"""How long nothing is compacted after a failure."""


class Compactor:
    """Owned by the driver of the group, and its thread.

    Parameters
    ----------
    group
        The driver's.
    machine
        Its machine, whether it has files or not.
    pace
        Slows the writing down; None: as fast as the disk takes it.
    """

    def __init__(self, group: int, machine: StateMachine, pace: Pace | None) -> None:
        self.failures: list[Exception] = []
        """What went wrong since somebody took these away."""
        self._group = group
        self._machine = machine if isinstance(machine, StoredMachine) else None
        self._pace = pace
        self._out: CompactJob | None = None
        self._rest = 0

    def take_job(self) -> CompactJob | None:
        """What is to be done next; None if there is nothing, or a job is out."""
        if self._machine is None or self._out is not None or self._rest or not self._machine.compaction_due:
            return None
        self._out = CompactJob(self._group, self._machine, self._pace)
        return self._out

    def finish_job(self, job: CompactJob) -> None:
        """`job` has run."""
        check(job is self._out, "a compaction finished that is not out")
        self._out = None
        if job.error is not None:
            self.failures.append(job.error)
            self._rest = REST_TICKS

    def tick(self) -> None:
        """A tick has passed."""
        self._rest = max(0, self._rest - 1)
