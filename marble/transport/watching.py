"""A node's security as its files say now: they are looked at again and again, and what has changed counts from then on.

Rule 1: what counts is replaced as a whole. Files that do not fit each other (a new certificate beside an old key, half a file) change
nothing: the last good ones stay, the log says once what is wrong, and the next look may find them mended.
Rule 2: content decides, not a time stamp: two writes in one tick of a clock, or a link that now points elsewhere, are seen.

One thread ("marble-security-…") from `start` to `stop`, if there is anything to watch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from marble.config import SecurityConfig
from marble.errors import UsageError
from marble.metrics import Metrics
from marble.transport.security import Security, files_of, read_security

_log = logging.getLogger("marble.transport")

STOP_TIMEOUT_S: Final = 2.0


class WatchedSecurity:
    """The security of one node. Thread-safe.

    Parameters
    ----------
    config
        Which files.
    node_id
        For the thread's name and the log.
    metrics
        Counts ``security_reloads`` and ``security_reload_failures``.

    Raises
    ------
    UsageError
        If the files are not there, or do not fit each other.
    """

    def __init__(self, config: SecurityConfig, node_id: int, metrics: Metrics) -> None:
        self._config = config
        self._node_id = node_id
        self._current = read_security(config)
        self._seen = self._contents()
        self._problem = ""
        self._looking = threading.Lock()
        self._changed: Callable[[Security, Security], None] = _ignore
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._reloads = metrics.counter("security_reloads")
        self._failures = metrics.counter("security_reload_failures")

    def current(self) -> Security:
        """What counts now."""
        return self._current

    def start(self, changed: Callable[[Security, Security], None]) -> None:
        """Begin to watch. `changed` is called with what counted before and what counts now, on the watching thread."""
        self._changed = changed
        if files_of(self._config):
            self._thread = threading.Thread(target=self._run, name=f"marble-security-{self._node_id}", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Have the files looked at now; returns at once. A signal handler may call it."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STOP_TIMEOUT_S)

    def _interval_s(self) -> float:
        tls, tokens = self._config.tls, self._config.tokens
        intervals = [each.reload_s for each in (tls, tokens) if each is not None]
        return min(intervals, default=10.0)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._interval_s())
            self._wake.clear()
            if not self._stopping:
                self.check()

    def check(self) -> bool:
        """Look at the files; whether something else counts now."""
        with self._looking:
            contents = self._contents()
            if contents == self._seen and not self._problem:
                return False
            try:
                fresh = read_security(self._config)
            except UsageError as error:
                if str(error) != self._problem:
                    self._failures.add()
                    _log.warning("node %d keeps the certificates and tokens it has: %s", self._node_id, error)
                self._problem = str(error)
                return False
            self._seen, self._problem = contents, ""
            before, self._current = self._current, fresh
            if before == fresh:
                return False
        self._changed(before, fresh)
        self._reloads.add()
        _log.info("node %d has read its certificates and tokens again", self._node_id)
        return True

    def _contents(self) -> list[bytes | None]:
        return [_content(path) for path in files_of(self._config)]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _ignore(before: Security, after: Security) -> None:
    """For changes that nobody waits for."""
