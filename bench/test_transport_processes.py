"""Messages from one process to another over loopback: marble, a bare Flight stream, a bare TCP socket, in one run.

    pytest bench/test_transport_processes.py --benchmark-enable --benchmark-group-by=group --benchmark-columns=median,rounds

``marble`` calls ``send_message`` for every message, ``marble-many`` ``send_messages`` for every hundred; the bare Flight stream gets
marble's packets ready-made, ``flight-checked`` hashes them at both ends as well, the socket gets the same bytes. Each has its turn with
a receiver that handles memory as Python's processes do (``as-it-is``), and as ``marble serve`` does (``kept``). What a round sends
is in its group's name: divide. Latencies stand beside the times as ``p50`` and ``p99``, in ms (in ``--benchmark-json``, and printed).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from transport_driver import SENDERS, Pair

# What stands under gRPC's log says nothing here, and would stand among the figures.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@pytest.fixture(scope="module", params=["", "kept"], ids=["as-it-is", "kept"])
def memory(request: pytest.FixtureRequest) -> bool:
    """Whether the receivers keep freed memory, as ``marble serve`` does."""
    return bool(request.param)


@pytest.fixture(scope="module", params=list(SENDERS))
def pair(request: pytest.FixtureRequest, memory: bool) -> Iterator[Pair]:
    made = Pair(request.param, memory)
    yield made
    made.close()


@pytest.mark.parametrize(("size", "count"), [(1024, 200_000), (1 << 20, 1000)], ids=["1KiB", "1MiB"])
def test_sustained(benchmark: Any, pair: Pair, size: int, count: int) -> None:
    count = count if benchmark.enabled else 10
    benchmark.group = f"sustained: {count} messages of {size} B"
    before_s = pair.spent_s()
    benchmark.pedantic(pair.sustain, args=(size, count), rounds=5, warmup_rounds=1)
    if benchmark.enabled:
        per_s = count / benchmark.stats.stats.median
        spent_ms = 1000 * (pair.spent_s() - before_s) / 6 / (count * size / 2**20)
        benchmark.extra_info.update(messages_per_s=round(per_s), mib_per_s=round(per_s * size / 2**20))
        benchmark.extra_info.update(processor_ms_per_mib=round(spent_ms, 3))
        show(benchmark)


@pytest.mark.parametrize(
    ("size", "per_s", "count"), [(1024, 10_000, 30_000), (1 << 20, 100, 300)], ids=["1KiB-10000", "1MiB-100"]
)
def test_offered(benchmark: Any, pair: Pair, size: int, per_s: int, count: int) -> None:
    if pair.kind == "marble-many":
        pytest.skip("messages that are due one by one are sent one by one")
    count = count if benchmark.enabled else 10
    benchmark.group = f"offered: {count} messages of {size} B, {per_s} per second"
    found = benchmark.pedantic(pair.offer, args=(size, count, per_s), rounds=1)
    assert 0 <= found["p50"] <= found["p99"] <= found["max"]
    benchmark.extra_info.update(found)
    if benchmark.enabled:
        show(benchmark)


def show(benchmark: Any) -> None:
    print(f"\n{benchmark.name}: {benchmark.extra_info}", file=sys.stderr)
