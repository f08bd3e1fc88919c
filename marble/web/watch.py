"""All of this package for one node: made, started and stopped together.

Rule 1: whoever embeds a node holds a `Watch`, not its parts. Without a configured port there is none, and the rest works.
"""

from __future__ import annotations

import abc
import os
from typing import Any

from marble.config import HttpConfig
from marble.web import exposition
from marble.web.health import Check
from marble.web.http import Authorize, HttpServer, picture
from marble.web.observer import Links, Observed, Observer


class Watch:
    """Health, metrics and perhaps the HTTP port of one node. `start` and `stop` belong to one caller; the rest is thread-safe.

    Parameters
    ----------
    node, node_id, directory, links
        As of `marble.web.observer.Observer`.
    http
        The port, which is taken at once; None: no port.
    authorize
        Who may read metrics and the status there; everybody if None.

    Raises
    ------
    UsageError, UnavailableError
        If the port cannot be had.
    """

    def __init__(
        self,
        node: Observed,
        node_id: int,
        directory: str | os.PathLike[str],
        links: Links | None = None,
        *,
        http: HttpConfig | None = None,
        authorize: Authorize | None = None,
    ) -> None:
        self._observer = Observer(node, node_id, directory, links)
        self._pages = {} if http is None else dict(http.pages)
        self._server = None if http is None else HttpServer(self._observer, http, authorize)

    def start(self) -> None:
        """Look at the node, which must have been started, and answer."""
        self._observer.start()
        if self._server is not None:
            self._server.start()

    def stop(self) -> None:
        """Free the port and end all threads. Idempotent."""
        if self._server is not None:
            self._server.stop()
        self._observer.stop()

    @property
    def url(self) -> str | None:
        """Of the page, if there is one."""
        return None if self._server is None else self._server.url

    def health(self) -> dict[str, Check]:
        """How each component is, as of now."""
        return self._observer.health()

    def metrics_text(self) -> str:
        """All metrics, as Prometheus reads them. Raises UsageError if ``prometheus_client`` is not installed."""
        return exposition.text(self._observer)

    def picture(self, after: float = -1.0) -> dict[str, Any]:
        """What the page shows, as values for JSON; of the history what is later than `after` (``uptime_s``)."""
        return picture(self._observer, after, self._pages)


class Watched(abc.ABC):
    """What an embedder can ask about its node: a part of `marble.server.RaftServer`."""

    @abc.abstractmethod
    def _watching(self, what: str) -> Watch:
        """The watch of the node, which must run; `what` was asked for."""

    def get_health_status(self) -> dict[str, bool]:
        """Each component of this node, and whether it is well: engine, leader, log, disk, ``transport/2``, ..."""
        return {name: check.healthy for name, check in self.get_health_details().items()}

    def get_health_details(self) -> dict[str, Check]:
        """The same with what was seen, in words, and whether the node is live and ready without it."""
        return self._watching("get_health_details").health()

    def get_metrics_text(self) -> str:
        """All metrics of this node in Prometheus' text format. Raises UsageError without ``prometheus_client``."""
        return self._watching("get_metrics_text").metrics_text()

    @property
    def page_url(self) -> str | None:
        """Where this node's page is, if it was given an HTTP port."""
        return self._watching("page_url").url
