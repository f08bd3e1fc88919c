"""When the machine of a group compacts its files: whenever it has something to compact, one job at a time. And when it reads them.

Rule 1: a compaction that failed changed nothing and is tried again, but not at once: a disk that is full stays so for a
while. What is damaged the machine leaves alone by itself.
Rule 2: each file is read through and checked once in `scrub_ticks`, spread evenly over that time, when there is nothing to compact:
what a disk has lost is found while the peers still have it, and healed as any other damage. And all of them at once when a peer
could not get from here what it was offered.
"""

from __future__ import annotations

from typing import Final

from marble.errors import check
from marble.jobs import CompactJob, ScrubJob
from marble.machine import HealingMachine, Pace, StateMachine, StoredMachine

REST_TICKS: Final = 50
"""How long nothing is compacted after a failure."""

SCRUBS_MIN: Final = 16
"""Into so many parts the time of a round is cut at least: files come and go, and none is to wait for a whole round."""


class Compactor:
    """Owned by the driver of the group, and its thread.

    Parameters
    ----------
    group
        The driver's.
    machine
        Its machine, whether it has files or not.
    pace
        Slows the writing and the checking down; None: as fast as the disk takes it.
    scrub_ticks
        How long one round over all files takes. 0: they are not checked.
    """

    def __init__(self, group: int, machine: StateMachine, pace: Pace | None, scrub_ticks: int = 0) -> None:
        self.scrubbed = 0
        """How many files were read through and checked since the start."""
        self.failures: list[Exception] = []
        """What went wrong since somebody took these away."""
        self._group = group
        self._machine = machine if isinstance(machine, StoredMachine) else None
        self._pace = pace
        self._out: CompactJob | None = None
        self._rest = 0
        self._healing = machine if isinstance(machine, HealingMachine) else None
        self._scrub_ticks = scrub_ticks
        self._hurried = False
        """Whether a round is under way that somebody waits for."""
        self._scrub_after = ""
        """The file that was checked last: they are checked in the order of their names, again and again."""
        self._scrub_wait = scrub_ticks // SCRUBS_MIN

    def take_job(self) -> CompactJob | None:
        """What is to be done next; None if there is nothing, or a job is out."""
        if self._machine is None or self._out is not None:
            return None
        if self._machine.compaction_due:
            if not self._rest:
                self._out = CompactJob(self._group, self._machine, self._pace)
        elif self._healing is not None and (self._hurried or (self._scrub_ticks and not self._scrub_wait)):
            self._out = ScrubJob(self._group, self._machine, self._healing, self._scrub_after, self._pace)
        return self._out

    def check_all(self) -> None:
        """Check all files, one after the other, from now on: one of them may be damaged, and nobody has noticed."""
        if not self._hurried:
            self._hurried, self._scrub_after = True, ""

    def finish_job(self, job: CompactJob) -> None:
        """`job` has run."""
        check(job is self._out, "a compaction finished that is not out")
        self._out = None
        if isinstance(job, ScrubJob):
            self.scrubbed += bool(job.name)
            self._scrub_after = job.name
            self._hurried = self._hurried and bool(job.name)
            # So few files that a round takes less than its time are checked more often, but not all the time.
            self._scrub_wait = max(1, self._scrub_ticks // max(SCRUBS_MIN, job.files))
        if job.error is not None:
            self.failures.append(job.error)
            self._rest = REST_TICKS

    def tick(self) -> None:
        """A tick has passed."""
        self._rest = max(0, self._rest - 1)
        self._scrub_wait = max(0, self._scrub_wait - 1)
