"""The story of the demo: start, write, kill the leader, go on, restart, catch up, compare.

Rule 1: the verdict is good only if every step was carried out and every replica was read and found identical with the
source. Whatever could not be checked counts as failed.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa

from marble.demo.compare import Comparison, compare
from marble.demo.display import Display
from marble.demo.processes import NodeProcess, Nodes, running_on_free_ports, serve_command
from marble.demo.source import Source
from marble.demo.writer import WINDOW, Writer, WriteStats
from marble.errors import MarbleError, UnavailableError, UsageError

DEFAULT_NODES: Final = 3
DEFAULT_BATCH_ROWS: Final = 1000
NODES_MAX: Final = 9
"""More processes than this on one machine show nothing but its scheduler."""

BATCHES_MIN: Final = 4
"""With a kill: two batches before it, one that is under way when it comes, one after it that tells when it is over."""

LEADER_TIMEOUT_S: Final = 60.0
CATCH_UP_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.05


class Scan(Protocol):
    """Rows on their way out of a table."""

    def to_table(self) -> pa.Table: ...


class Table(Protocol):
    """What the demo uses of `marble.database.Table`."""

    def write_async(self, data: pa.RecordBatch) -> Future[int]: ...

    def scan(self, *, consistency: Any) -> Scan: ...


class Database(Protocol):
    """What the demo uses of `marble.database.Database`."""

    def create_table(self, name: str, schema: pa.Schema, key: Sequence[str]) -> Table: ...

    def table(self, name: str) -> Table: ...

    def status(self) -> Mapping[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the user asked for, checked.

    Parameters
    ----------
    source
        The rows.
    nodes
        How many processes; 3 or more if one is to be killed.
    batch_rows
        Rows in one write; fewer if there would be no batch left to write after the kill.
    keep
        An empty or missing directory to leave everything in; None: a temporary one.
    kill
        Whether to kill the leader halfway.
    """

    source: Source
    nodes: int = DEFAULT_NODES
    batch_rows: int = DEFAULT_BATCH_ROWS
    keep: Path | None = None
    kill: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= NODES_MAX:
            raise UsageError(f"--nodes {self.nodes}: a demo has 1 to {NODES_MAX}")
        if self.batch_rows < 1:
            raise UsageError(f"--batch-rows {self.batch_rows}: a batch has 1 row or more")
        if self.kill and self.nodes < 3:
            raise UsageError(
                f"--nodes {self.nodes}: without its leader no majority is left; give 3 nodes or more, or --no-kill"
            )
        if self.kill and self.source.rows.num_rows < BATCHES_MIN:
            raise UsageError(
                f"{self.source.rows.num_rows} rows are too few to kill a leader among: give {BATCHES_MIN}, or --no-kill"
            )
        if self.keep is not None and self.keep.exists() and (not self.keep.is_dir() or any(self.keep.iterdir())):
            raise UsageError(f"--keep {self.keep}: not an empty directory")


def run_demo(
    options: DemoOptions,
    display: Display,
    connect: Callable[[str], Database],
    command: Callable[[Path], list[str]] = serve_command,
) -> bool:
    """Run the whole story. No process of it is left when this returns or raises.

    Parameters
    ----------
    connect
        Opens a database from a ``grpc://`` address. Given a single endpoint, status and local reads are that node's.
    command
        The command line that serves a node from its config file.

    Returns
    -------
    bool
        Whether everything was as it must be.

    Raises
    ------
    MarbleError
        If a step could not be carried out; the nodes' directories are then left, and the display says where.
    """
    with contextlib.ExitStack() as stack:
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            directory = options.keep.absolute()
        else:
            temporary = tempfile.TemporaryDirectory(prefix="marble-demo-", ignore_cleanup_errors=True)
            directory = Path(stack.enter_context(temporary))
        try:
            return _Demo(options, display, connect, directory).run(command)
        except MarbleError:
            display.end()
            if options.keep is None:
                # What went wrong is in the nodes' logs: they are worth more than a clean /tmp.
                kept = directory.with_name(directory.name + "-failed")
                directory.rename(kept)
                directory.mkdir()
                directory = kept
            display.say(f"the nodes' data and logs are in {directory}")
            raise


class _Demo:
    """One run. Node ids, each 0 before its time: ``_target`` leads and is to be killed with the next write, ``_killed``
    was, ``_dead`` was and does not run again yet.
    """

    def __init__(
        self, options: DemoOptions, display: Display, connect: Callable[[str], Database], directory: Path
    ) -> None:
        self._options = options
        self._display = display
        self._connect = connect
        self._directory = directory
        self._endpoints: dict[int, str] = {}
        self._nodes = Nodes({})
        self._dead = 0
        self._target = 0
        self._killed = 0
        self._leader = ""
        self._measured: list[tuple[str, str]] = []
        self._never = threading.Event()

    def run(self, command: Callable[[Path], list[str]]) -> bool:
        source, display = self._options.source, self._display
        display.say(
            f"{source.name}: {source.rows.num_rows:,} rows, {source.rows.num_columns} columns, "
            f"{source.rows.nbytes / 1e6:,.1f} MB of Arrow; key {', '.join(source.key)}"
        )
        with running_on_free_ports(self._options.nodes, lambda ports: self._make_nodes(ports, command)) as (nodes, _):
            self._nodes = nodes
            for node, process in nodes.processes.items():
                display.say(f"node {node}: process {process.pid}, {self._endpoints[node]}")
            leader, term = self._find_leader()
            self._leader = f"leader node {leader}"
            display.say(f"node {leader} leads in term {term}")
            stats = self._write_all()
            self._report(stats)
            if self._killed:
                self._restart(stats.last_index)
            problems = self._compare_replicas(stats.last_index)
            codes = nodes.stop()
            problems += [f"node {node} did not end in order ({code})" for node, code in codes.items() if code != 0]
        display.summary(self._measured)
        if self._options.keep is not None:
            display.say(f"kept in {self._directory}; to look into a node's log: marble log {self._directory}/node-1")
        count = f"{source.rows.num_rows:,} rows"
        if problems:
            display.verdict(False, "; ".join(problems))
        else:
            what = "a killed leader cost no row and doubled none" if self._killed else "nothing was killed"
            display.verdict(
                True, f"{count} on each of {len(codes)} replicas, every value identical with the source; {what}"
            )
        return not problems

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _make_nodes(self, ports: Sequence[int], command: Callable[[Path], list[str]]) -> Nodes:
        self._endpoints = {node: f"127.0.0.1:{port}" for node, port in enumerate(ports, start=1)}
        processes = {}
        for node in self._endpoints:
            path = self._directory / f"node-{node}.toml"
            # JSON's strings and lists are TOML's too.
            path.write_text(
                f'[node]\nid = {node}\ndata_dir = {json.dumps(f"node-{node}")}\n\n[cluster]\ncluster_id = "demo"\n'
                f"node_endpoints = {json.dumps(list(self._endpoints.values()))}\n"
            )
            processes[node] = NodeProcess(f"node {node}", command(path), self._directory / f"node-{node}.log")
        return Nodes(processes)

    def _watch(self) -> None:
        self._nodes.check_alive(except_for=[self._dead])

    @contextlib.contextmanager
    def _member(self, node: int) -> Iterator[Database]:
        """A connection to one node alone."""
        database = self._connect(f"grpc://{self._endpoints[node]}")
        try:
            yield database
        finally:
            database.close()

    def _status(self, node: int) -> Mapping[str, Any] | None:
        """The node's own status; None if it does not answer."""
        try:
            with self._member(node) as database:
                status = database.status()
        except UnavailableError:
            return None
        if status["node_id"] != node:
            raise UsageError(f"{self._endpoints[node]} answers as node {status['node_id']}, not as node {node}")
        return status

    def _find_leader(self) -> tuple[int, int]:
        """The node that leads in the highest term, and the term. Waits for an election."""
        end = time.monotonic() + LEADER_TIMEOUT_S
        while time.monotonic() < end:
            self._watch()
            found = {node: self._status(node) for node in self._endpoints if node != self._dead}
            leaders = {node: status["term"] for node, status in found.items() if status and status["role"] == "leader"}
            if leaders:
                leader = max(leaders, key=leaders.__getitem__)
                return leader, leaders[leader]
            self._never.wait(_POLL_S)
        raise UnavailableError(f"no leader was elected within {LEADER_TIMEOUT_S:g} s")

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write_all(self) -> WriteStats:
        source, display = self._options.source, self._display
        total = source.rows.num_rows
        kill = self._options.kill
        batches = source.batches(
            min(self._options.batch_rows, total // BATCHES_MIN) if kill else self._options.batch_rows
        )
        # A window of less than half of the batches leaves two that are not yet offered when half is acknowledged.
        window = max(1, min(WINDOW, len(batches) // 2 - 1)) if kill else WINDOW
        database = self._connect(f"grpc://{','.join(self._endpoints.values())}")
        try:
            table = database.create_table(source.name, source.rows.schema, list(source.key))

            def write(batch: pa.RecordBatch) -> Future[int]:
                future = table.write_async(batch)
                if self._target and not self._killed:
                    # Now, while this batch is under way: that is the moment that loses rows, if any does.
                    self._kill(self._target, writer)
                return future

            def acknowledged() -> None:
                rows = writer.stats.rows
                if kill and not self._target and 2 * rows >= total:
                    self._target, _ = self._find_leader()
                elif self._dead and not self._leader and writer.stats.failover_s is not None:
                    leader, term = self._find_leader()
                    self._leader = f"leader node {leader}"
                    display.say(f"node {leader} leads in term {term}: {writer.stats.failover_s:.3f} s after the kill")
                display.advance(rows, self._leader or "no leader")

            writer = Writer(write, self._watch, window)
            display.begin(total, self._leader)
            stats = writer.run(batches, acknowledged)
            display.end()
        finally:
            database.close()
        return stats

    def _kill(self, leader: int, writer: Writer) -> None:
        process = self._nodes.processes[leader]
        pid = process.pid
        # The mark comes first, so that the failover is never shown shorter than it was.
        writer.mark_failure()
        self._dead = self._killed = leader
        self._leader = ""
        process.kill()
        self._display.say(f"killed node {leader}, the leader (SIGKILL to process {pid}), at {writer.stats.rows:,} rows")

    def _report(self, stats: WriteStats) -> None:
        seconds = max(stats.seconds, 1e-9)
        failover = " (failover included)" if self._killed else ""
        batches = len(stats.latencies_s) + len(stats.failover_latencies_s)
        p50_ms, p99_ms = stats.latency_s(0.5) * 1e3, stats.latency_s(0.99) * 1e3
        self._measured += [
            ("written", f"{stats.rows:,} rows in {batches:,} batches, {stats.seconds:.2f} s{failover}"),
            ("rate", f"{stats.rows / seconds:,.0f} rows/s, {stats.nbytes / seconds / 1e6:,.2f} MB/s{failover}"),
            ("write latency", f"p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms for a batch, {stats.window} under way"),
        ]
        if self._killed:
            measured = "not measured" if stats.failover_s is None else f"{stats.failover_s:.3f} s"
            self._measured += [
                ("failover", f"{measured} from SIGKILL to the first acknowledged write after it"),
                ("under way in it", f"{len(stats.failover_latencies_s)} batches, {stats.repeats} writes were repeated"),
            ]

    def _restart(self, index: int) -> None:
        node = self._killed
        begun = time.monotonic()
        process = self._nodes.processes[node]
        process.start()
        process.wait_ready()
        ready_s = time.monotonic() - begun
        self._dead = 0
        self._display.say(f"node {node} runs again (process {process.pid}); it catches up")
        self._wait_applied(node, index)
        caught_up_s = time.monotonic() - begun
        self._display.say(f"node {node} has caught up to entry {index}")
        self._measured.append(("restart", f"node {node}: ready in {ready_s:.2f} s, caught up in {caught_up_s:.2f} s"))

    # -- reading ---------------------------------------------------------------------------------------------------

    def _wait_applied(self, node: int, index: int) -> None:
        end = time.monotonic() + CATCH_UP_TIMEOUT_S
        applied = 0
        while time.monotonic() < end:
            self._watch()
            status = self._status(node)
            applied = status["applied_index"] if status is not None else applied
            if applied >= index:
                return
            self._never.wait(_POLL_S)
        raise UnavailableError(f"node {node} applied {applied} of {index} entries within {CATCH_UP_TIMEOUT_S:g} s")

    def _compare_replicas(self, index: int) -> list[str]:
        source, problems = self._options.source, []
        for node in self._endpoints:
            self._wait_applied(node, index)
            with self._member(node) as database:
                replica = database.table(source.name).scan(consistency="local").to_table()
            found: Comparison = compare(source.rows, replica, source.key)
            says = "identical with the source" if found.identical else found.problem
            self._display.say(f"node {node}: {found.rows:,} rows, {says}")
            self._measured.append((f"replica {node}", f"{found.rows:,} rows, {says}"))
            if not found.identical:
                problems.append(f"node {node}: {found.problem}")
        return problems
