"""Flight clients by endpoint."""

from __future__ import annotations

import socket

import pytest

from marble.config import parse_endpoint
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


def test_another_client_takes_the_place_of_one_that_is_renewed() -> None:
    pool = ClientPool()
    first, other = pool.get("127.0.0.1:1"), pool.get("127.0.0.1:2")
    pool.renew("127.0.0.1:1")
    pool.renew("127.0.0.1:3")
    second = pool.get("127.0.0.1:1")
    assert second is not first
    assert pool.get("127.0.0.1:2") is other
    assert pool.forget(first) is None
    assert pool.get("127.0.0.1:1") is second
    assert pool.forget(second) == "127.0.0.1:1"
    assert pool.get("127.0.0.1:1") is not second
    pool.close()


def test_a_node_with_several_addresses_is_called_where_it_takes_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marble.transport.pool.LOOK_S", 0.0)
    pool = ClientPool()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (one, two)]
        endpoint = ",".join(addresses)
        assert pool.get(endpoint) is pool.get(addresses[0])
        one.close()
        assert pool.get(endpoint) is pool.get(addresses[1])
        # It stays where it is well.
        with socket.create_server(parse_endpoint(addresses[0])):
            assert pool.get(endpoint) is pool.get(addresses[1])
        two.close()
        assert pool.get(endpoint) is pool.get(addresses[1])
    pool.close()


def test_addresses_are_not_tried_at_each_call() -> None:
    pool = ClientPool()
    with socket.create_server(("127.0.0.1", 0)) as one:
        address = f"127.0.0.1:{one.getsockname()[1]}"
        endpoint = f"{address},127.0.0.1:1"
        assert pool.get(endpoint) is pool.get(address)
    assert pool.get(endpoint) is pool.get(address)
    pool.close()
