"""Looks at a node once a second, and remembers: what health, metrics and the page are made of.

Rule 1: the node is asked the way any caller asks it. An engine that does not answer keeps nobody here waiting: that it owes an
answer, and since when, is the news.
Rule 2: one question is out at a time, and an answer that is younger than `FRESH_S` serves all who ask, so that no crowd of
scrapers costs the engine more than a few turns a second.
Rule 3: bounded: one answer, and the last `marble.sampling.HISTORY_S_MAX` seconds.

Thread: ``marble-observer-N``, with the number of the node; from `Observer.start` to `Observer.stop`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Final, Protocol

from marble.env import Clock, SystemClock
from marble.errors import MarbleError
from marble.metrics import Metrics
from marble.sampling import History, Moment, take
from marble.web.health import Check, Limits, Observation, examine
from marble.web.host import look_at_disk

logger = logging.getLogger("marble.server")

INTERVAL_S: Final = 1.0
"""Between two looks that are remembered."""

FRESH_S: Final = 0.2
"""A younger answer is new enough for everybody."""

ANSWER_WAIT_S: Final = 0.5
"""How long a look waits for the engine, which answers within milliseconds; after that what was known before has to do."""

STOP_WAIT_S: Final = 5.0
"""How long a stop waits for the thread, which waits for nothing longer than `ANSWER_WAIT_S` itself."""


class Observed(Protocol):
    """What is looked at: `marble.node.Node`."""

    metrics: Metrics

    @property
    def is_running(self) -> bool: ...
    @property
    def failure(self) -> BaseException | None: ...
    def look(self) -> Future[dict[str, Any]]: ...
    def working(self) -> dict[str, float]: ...


class Links(Protocol):
    """What is looked at beside the node: `marble.transport.flight.FlightTransport`."""

    def connected(self, peer: int) -> bool: ...
    def round_trip_s(self, peer: int) -> float | None: ...


class Observer:
    """Watches one node. Thread-safe; `start` and `stop` belong to one caller.

    Parameters
    ----------
    node
        Who is watched.
    node_id
        Its number.
    directory
        Its data directory.
    links
        The connections to peers, if the node has peers to talk to.
    clock
        Time; the system's by default.
    limits
        What counts as well.
    """

    def __init__(
        self,
        node: Observed,
        node_id: int,
        directory: str | os.PathLike[str],
        links: Links | None = None,
        *,
        clock: Clock | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.node_id = node_id
        self.metrics = node.metrics
        self.limits = limits or Limits()
        self._node = node
        self._directory = directory
        self._links_now = links
        self._clock = clock or SystemClock()
        self._born = self._clock.monotonic()
        self._lock = threading.Lock()
        self._status: dict[str, Any] = {}
        self._answered_at = -FRESH_S
        self._turn_s = 0.0
        self._question: Future[dict[str, Any]] | None = None
        self._asked_at = 0.0
        self._history = History()
        self._past: deque[tuple[float, int, int]] = deque(maxlen=64)
        """When, the commit index, and the end of the log if this node led: one a second."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Look for the first time, and go on doing so on a thread."""
        self.look(remember=True)
        self._thread = threading.Thread(target=self._run, name=f"marble-observer-{self.node_id}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. What was seen stays. Idempotent."""
        self._stopping.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(STOP_WAIT_S)

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            try:
                self.look(remember=True)
            except Exception:
                # A page that stands still is better than one that is gone, and much better than a node that is.
                logger.exception("node %d could not be looked at", self.node_id)

    # -- looking -----------------------------------------------------------------------------------------------------

    def look(self, *, remember: bool = False) -> dict[str, Any]:
        """The node's status, at most `FRESH_S` old unless the engine is late; empty if it never answered.

        With `remember`, it becomes a moment of the history.
        """
        with self._lock:
            now = self._clock.monotonic()
            if self._question is None and now - self._answered_at > FRESH_S:
                self._question, self._asked_at = self._node.look(), now
            question = self._question
        if question is not None:
            self._await(question)
        with self._lock:
            if remember and self._question is None and self._status:
                self._remember()
            return self._status

    def _await(self, question: Future[dict[str, Any]]) -> None:
        try:
            status = question.result(ANSWER_WAIT_S)
        except FutureTimeoutError:
            if not question.done():
                return
            status = {}
        except MarbleError:
            # It has ended, and `is_running` and `failure` say so.
            status = {}
        with self._lock:
            if question is not self._question:
                return  # Somebody else, who waited for the same answer, has taken it in.
            self._question = None
            self._answered_at = self._clock.monotonic()
            self._turn_s = self._answered_at - self._asked_at
            if status:
                self._status = status | {"links": self._links(status)}

    def _links(self, status: dict[str, Any]) -> dict[str, Any]:
        links = self._links_now
        if links is None:
            return {}
        others = [int(peer) for peer in status["nodes"] if peer != str(self.node_id)]
        return {
            str(peer): {"connected": links.connected(peer), "round_trip_s": links.round_trip_s(peer)} for peer in others
        }

    def _remember(self) -> None:
        now, status = self._clock.monotonic(), self._status
        self._history.add(take(status, now), at=round(now - self._born, 3))
        written = status["last_index"] if status["role"] == "leader" else 0
        self._past.append((now, status["commit_index"], written))

    # -- what was seen -----------------------------------------------------------------------------------------------

    @property
    def uptime_s(self) -> float:
        """Since this was made. Moments of the history are told apart by it."""
        return self._clock.monotonic() - self._born

    @property
    def turn_s(self) -> float:
        """How long the engine took for its last answer, or has taken so far if it owes one."""
        with self._lock:
            return self._silent_s() or self._turn_s

    def moments(self, after: float = -1.0) -> list[Moment]:
        """The history, as far as it is later than `after`, in seconds of `uptime_s`."""
        with self._lock:
            return self._history.moments(after)

    def observe(self) -> Observation:
        """All that health is decided from, as of now."""
        status = self.look()
        failure = self._node.failure
        with self._lock:
            now = self._clock.monotonic()
            silent_s = self._silent_s()
            committed = max((commit for at, commit, _ in self._past if at <= now - self.limits.apply_lag_s), default=0)
            # Whoever has led without a break: an older leader's log may have lost its end.
            leading = [(at, written) for at, _, written in self._past]
            while leading and not all(written for _, written in leading):
                leading.pop(0)
            written = max((end for at, end in leading if at <= now - self.limits.peer_lag_s), default=0)
        return Observation(
            running=self._node.is_running,
            failure=None if failure is None else f"{type(failure).__name__}: {failure}",
            silent_s=silent_s,
            working=self._node.working(),
            status=status,
            committed_before=committed,
            written_before=written,
            disk=look_at_disk(self._directory),
            clock_skew_s=self.clock_skew_s(status),
            alone=self._links_now is None,
        )

    def health(self) -> dict[str, Check]:
        """How each component is, as of now."""
        return examine(self.observe(), self.limits)

    @staticmethod
    def clock_skew_s(status: dict[str, Any]) -> float:
        """By how much the latest entry is from the future, by this node's clock; 0.0 if it is not.

        Only this direction is certain: an old entry may just be old.
        """
        ahead_us = int(status.get("entry_time_us", 0)) - int(status.get("wall_us", 0))
        return max(0.0, ahead_us / 1e6)

    def _silent_s(self) -> float:
        return 0.0 if self._question is None else self._clock.monotonic() - self._asked_at
