"""A node's metrics in the text that Prometheus reads, made when it is asked for.

Rule 1: counts are exact: they are those of `marble.metrics` at that moment. Gauges are of a look that is at most
`marble.web.observer.FRESH_S` old, unless the engine is late.
Rule 2: every metric of `marble.web.instruments` is there from the start, with its help, also while there is nothing to show.

Needs ``prometheus_client`` (``pip install 'marbledb[server]'``).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from marble.errors import UsageError
from marble.metrics import EDGES, Counter, Gauge, Histogram, Instrument, Labels, Spread
from marble.sampling import peers
from marble.types import Role
from marble.web.health import examine, is_ready
from marble.web.host import look_at_process
from marble.web.instruments import INSTRUMENTS, PREFIX, Described, Kind

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from marble.web.observer import Observer

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS: Final = [
    slot for slot, edge in enumerate(EDGES) if 1e-5 <= edge <= 100 and f"{edge:e}"[:4] in ("1.00", "2.20", "4.70")
]
"""Of a histogram's buckets every fourth: three to a decade, from 10 microseconds to 100 seconds."""

_COPIED: Final = (
    "last_index",
    "persisted_index",
    "commit_index",
    "applied_index",
    "snapshot_index",
    "purged_index",
    "term",
    "leader_id",
    "log_bytes",
    "memory_bytes",
    "backlog_bytes",
    "sessions",
)
"""What a status says under the same name."""

Sample = tuple[tuple[str, ...], float]
"""Values of the labels, and the value."""


def text(observer: Observer) -> str:
    """All metrics of the node that `observer` watches, in Prometheus' text format.

    Raises
    ------
    UsageError
        If ``prometheus_client`` is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError:
        raise UsageError("metrics need prometheus_client: pip install 'marbledb[server]'") from None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(observer))
    return generate_latest(registry).decode()


class _Collector:
    """What `prometheus_client` asks."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        gauges = _gauges(self._observer)
        counted = dict(self._observer.metrics.collect())
        for name, described in INSTRUMENTS.items():
            yield _family(described, counted.pop(name, []), gauges.get(name, []))
        for name, instruments in counted.items():
            if not instruments:
                continue
            # What somebody counts and did not describe is shown all the same; a test complains.
            kind = {Counter: Kind.COUNTER, Gauge: Kind.GAUGE, Histogram: Kind.HISTOGRAM}[type(instruments[0][1])]
            labels = tuple(label for label, _ in instruments[0][0])
            yield _family(Described(name, kind, "seconds", "not described", labels), instruments, [])


def _family(described: Described, instruments: list[tuple[Labels, Instrument]], gauges: list[Sample]) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    name, labels = PREFIX + described.name, described.labels
    if instruments:
        labels = tuple(label for label, _ in instruments[0][0])
    meaning = f"{described.meaning} ({described.unit})"
    meaning = meaning[0].upper() + meaning[1:]
    found = [(tuple(value for _, value in each), instrument) for each, instrument in instruments]
    if described.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(name, meaning, labels=labels)
        for values, instrument in found or ([] if labels else [((), Histogram())]):
            if isinstance(instrument, Histogram):
                spread = instrument.spread()
                histogram.add_metric(values, buckets=_buckets(spread), sum_value=spread.sum)
        return histogram
    family = CounterMetricFamily if described.kind is Kind.COUNTER else GaugeMetricFamily
    made = family(name, meaning, labels=labels)
    samples = [(values, instrument.value) for values, instrument in found if not isinstance(instrument, Histogram)]
    for values, value in [*samples, *gauges] or ([] if labels else [((), 0)]):
        made.add_metric(values, value)
    return made


def _buckets(spread: Spread) -> list[tuple[str, float]]:
    """Cumulative counts, which are exact: an exported edge is an edge inside."""
    found, total, begin = [], 0, 0
    for slot in _SECONDS:
        total += sum(spread.counts[begin : slot + 1])
        begin = slot + 1
        found.append((repr(EDGES[slot]), float(total)))
    return [*found, ("+Inf", float(spread.total))]


def _gauges(observer: Observer) -> dict[str, list[Sample]]:
    """What is computed when somebody looks, by the name inside."""
    seen = observer.observe()
    checks, status = examine(seen, observer.limits), seen.status
    found: dict[str, list[Sample]] = {
        "healthy": [((name,), float(check.healthy)) for name, check in checks.items()],
        "ready": [((), float(is_ready(checks)))],
        "working_seconds": [((name,), seconds) for name, seconds in seen.working.items()],
        "engine_turn_seconds": [((), observer.turn_s)],
        "clock_skew_seconds": [((), seen.clock_skew_s)],
        "uptime_seconds": [((), observer.uptime_s)],
        "disk_free_bytes": [((), 0.0 if seen.disk is None else seen.disk.free_bytes)],
        "disk_size_bytes": [((), 0.0 if seen.disk is None else seen.disk.size_bytes)],
    }
    process = look_at_process()
    found |= {
        "process_threads": [((), process.threads)],
        "process_open_fds": [((), process.open_fds)],
        "process_resident_bytes": [((), process.resident_bytes)],
        "process_cpu_seconds": [((), process.cpu_seconds)],
    }
    return found | (_of_status(status) if status else {})


def _of_status(status: Any) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {name: [((), status[name])] for name in _COPIED}
    labels = (status["cluster_id"], str(status["node_id"]), importlib.metadata.version("marbledb"))
    found |= {
        "node_info": [(labels, 1.0)],
        "role": [((role.value,), float(status["role"] == role.value)) for role in Role],
        "leads": [((), float(status["role"] == Role.LEADER.value))],
        "voters": [((), len(status["members"]))],
        "apply_lag_entries": [((), max(0, status["commit_index"] - status["applied_index"]))],
    }
    others = [peer for peer in peers(status) if not peer.here]
    for name, attribute in (
        ("peer_connected", "connected"),
        ("peer_match_index", "match_index"),
        ("peer_lag_entries", "lag"),
        ("peer_inflight_messages", "inflight_messages"),
        ("peer_inflight_bytes", "inflight_bytes"),
    ):
        values = [(str(peer.node), getattr(peer, attribute)) for peer in others]
        found[name] = [((node,), float(value)) for node, value in values if value is not None]
    return found
