"""Who may look at a node over HTTP: the tokens are those of its Flight port, and they are read anew with them.

Rule 1: where the node asks clients for tokens, metrics and the status want one, too: any that is valid, whatever it may do with
tables. Health is told to everybody: supervisors have no secrets.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

from marble.metrics import Metrics
from marble.transport.security import BEARER, Security
from marble.web.http import Authorize


def token_authority(security: Callable[[], Security], metrics: Metrics) -> Authorize:
    """What decides about an ``Authorization`` header.

    Parameters
    ----------
    security
        What counts now.
    metrics
        Counts refusals as ``transport_unauthenticated``, as the Flight port does.
    """
    refused = metrics.counter("transport_unauthenticated")

    def may(header: str | None) -> bool:
        tokens = security().tokens
        if tokens is None:
            return True
        given = header or ""
        # A missing token is compared like any other: how long that takes tells nothing.
        token = given[len(BEARER) :].strip() if given.startswith(BEARER) else ""
        good = tokens.find(token, datetime.datetime.now(datetime.UTC)) is not None
        if not good and header is not None:
            refused.add()
        return good

    return may
