"""A thread beside the engine that runs one kind of job, in order.

Rule 1: a job comes back through the engine's inbox, and what it raises ends the engine.
Rule 2: what was quick lately may be done on the engine's own thread instead, while the worker has nothing to do: that saves
two changes of threads, which under the interpreter's lock cost more than a small sync or a small call of apply.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Final, Generic, NoReturn, Protocol, TypeVar

from marble.env import Clock
from marble.metrics import Histogram

QUICK_S: Final = 0.005
"""Who posts to the engine meanwhile waits no longer than this, as a rule."""
QUICK_AFTER: Final = 8
"""How many jobs in a row must have been quick before the next is done on the spot."""


class Job(Protocol):
    """Something that may take long."""

    def run(self) -> None: ...


J = TypeVar("J", bound=Job)


class Worker(Generic[J]):
    """Owned by the engine thread, but for the thread inside.

    Parameters
    ----------
    name
        Of the thread.
    post
        Has the engine run something on its thread.
    done
        Called on the engine thread after each job.
    clock
        Measures how long jobs take.
    seconds
        Where that goes, by the class of the job.
    """

    def __init__(
        self,
        name: str,
        post: Callable[[Callable[[], None]], None],
        done: Callable[[J], None],
        clock: Clock,
        seconds: Mapping[type, Histogram] | None = None,
    ) -> None:
        self.outstanding = 0
        """Jobs that were put and have not come back."""
        self._post = post
        self._done = done
        self._clock = clock
        self._seconds = {} if seconds is None else dict(seconds)
        self._begun: float | None = None
        self._wary = 0
        self._queue: queue.SimpleQueue[J | None] = queue.SimpleQueue()
        self.thread: Final = threading.Thread(target=self._loop, name=name, daemon=True)

    @property
    def quick(self) -> bool:
        """Whether a job may be done on the spot: nothing is out, and the last ones took no time."""
        return self.outstanding == 0 and self._wary == 0

    @property
    def busy_s(self) -> float:
        """For how long the job that runs now has been running; 0.0 if there is none. On any thread."""
        begun = self._begun
        return 0.0 if begun is None else self._clock.monotonic() - begun

    def run_here(self, job: J) -> None:
        """Do `job` on the spot."""
        self._run(job)
        self._done(job)

    def put(self, job: J) -> None:
        """Have `job` done by the worker's thread."""
        self.outstanding += 1
        self._queue.put(job)

    def end(self) -> None:
        """Let the thread end once what it has is done."""
        self._queue.put(None)

    def _run(self, job: J) -> None:
        begun = self._begun = self._clock.monotonic()
        try:
            job.run()
        finally:
            self._begun = None
        took = self._clock.monotonic() - begun
        if (histogram := self._seconds.get(type(job))) is not None:
            histogram.observe(took)
        slow = took > QUICK_S
        # Written by the engine only while nothing is out, and by the thread only while something is.
        self._wary = QUICK_AFTER if slow else max(0, self._wary - 1)

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._run(job)
            except BaseException as error:
                self._post(_raiser(error))
                return
            self._post(self._back(job))

    def _back(self, job: J) -> Callable[[], None]:
        def back() -> None:
            self.outstanding -= 1
            self._done(job)

        return back


def _raiser(error: BaseException) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail
