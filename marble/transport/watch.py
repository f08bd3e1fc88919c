"""A thread that looks at the links of a transport: peers that do not answer are noticed here, for who writes may be stuck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from marble.env import Clock

PAUSE_MAX_S: Final = 1.0
PAUSE_MIN_S: Final = 0.005


class Watched(Protocol):
    """A `marble.transport.link.Link`, or several to one peer."""

    def watch(self, now: float) -> float:
        """Give up what has not answered for too long. Seconds until the next look. Must not block."""
        ...


class Watch:
    """Looks from `start` until `stop`.

    Parameters
    ----------
    node
        For the thread's name.
    links
        Gives those that there are now.
    clock
        Tells `Watched.watch` the time.
    failed
        Called with an error that is ours; the thread ends after it.
    """

    def __init__(
        self,
        node: int,
        links: Callable[[], Iterable[Watched]],
        clock: Clock,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._links = links
        self._clock = clock
        self._failed = failed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"marble-watch-{node}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Whether the thread has ended within `timeout_s` seconds. Idempotent; also if it was never started."""
        self._stopping.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            pause_s = PAUSE_MIN_S
            while not self._stopping.wait(pause_s):
                now = self._clock.monotonic()
                pause_s = max(PAUSE_MIN_S, min((link.watch(now) for link in self._links()), default=PAUSE_MAX_S))
        except BaseException as error:
            # A broken invariant here must stop the node, not only this thread.
            self._failed(error)
