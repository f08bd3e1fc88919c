"""Flight clients by endpoint."""

from __future__ import annotations

import pytest

from marble.errors import UnavailableError
from marble.transport.pool import ClientPool


def test_there_is_one_client_for_each_node_and_none_after_close() -> None:
    pool = ClientPool()
    first = pool.get("127.0.0.1:1")
    assert pool.get("127.0.0.1:1") is first
    assert pool.get("127.0.0.1:2") is not first
    pool.close()
    pool.close()
    with pytest.raises(UnavailableError, match="closed"):
        pool.get("127.0.0.1:1")
