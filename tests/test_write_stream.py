"""Streams of writes: how many fly, in which order, and what an error leaves behind, on a scripted backend."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pyarrow as pa
import pytest
from reference.machine_backend import MachineBackend

from marble.database import Database, Table, window
from marble.database.window import WRITES_IN_FLIGHT_BYTES_MAX, WRITES_IN_FLIGHT_MAX
from marble.errors import OutcomeUnknownError, UnavailableError, UsageError
from marble.schema import TableInfo

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string()), ("score", pa.float64())])


def people(*rows: tuple[int, str | None, float | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)


class ScriptedBackend(MachineBackend):
    """Writes wait until the test completes them; `refuse` may raise at the call."""

    def __init__(self) -> None:
        super().__init__()
        self.flying: list[tuple[pa.RecordBatch, Future[int]]] = []
        self.refuse: Callable[[int], Exception | None] = lambda number: None
        self.calls = 0
        self.called = threading.Semaphore(0)
        self.written = 0

    def write(self, table: TableInfo, batch: pa.RecordBatch) -> Future[int]:
        self.calls += 1
        error = self.refuse(self.calls)
        if error is not None:
            raise error
        future: Future[int] = Future()
        self.flying.append((batch, future))
        self.called.release()
        return future

    def complete(self, answer: int | Exception) -> None:
        _, future = self.flying.pop(0)
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def batches(count: int, width: int = 1) -> pa.Table:
    return pa.Table.from_batches([people((i, "x" * width, 0.0)) for i in range(count)])


class TestWriteStream:
    @pytest.fixture
    def backend(self) -> ScriptedBackend:
        return ScriptedBackend()

    @pytest.fixture
    def table(self, backend: ScriptedBackend) -> Table:
        return Database(backend).create_table("people", SCHEMA, ["id"])

    def run(self, table: Table, data: object) -> Future[int]:
        """Write on another thread."""
        outcome: Future[int] = Future()

        def write() -> None:
            try:
                outcome.set_result(table.write(data))
            except Exception as error:
                outcome.set_exception(error)

        threading.Thread(target=write, daemon=True).start()
        return outcome

    def await_calls(self, backend: ScriptedBackend, count: int) -> None:
        for _ in range(count):
            assert backend.called.acquire(timeout=30)

    def test_pipelines_up_to_a_count(self, table: Table, backend: ScriptedBackend) -> None:
        outcome = self.run(table, batches(WRITES_IN_FLIGHT_MAX + 2))
        self.await_calls(backend, WRITES_IN_FLIGHT_MAX)
        assert len(backend.flying) == WRITES_IN_FLIGHT_MAX
        backend.complete(10)
        self.await_calls(backend, 1)
        assert len(backend.flying) == WRITES_IN_FLIGHT_MAX
        backend.complete(11)
        self.await_calls(backend, 1)
        for index in range(WRITES_IN_FLIGHT_MAX):
            backend.complete(12 + index)
        assert outcome.result(timeout=30) == 11 + WRITES_IN_FLIGHT_MAX

    def test_pipelines_up_to_bytes(self, table: Table, backend: ScriptedBackend) -> None:
        outcome = self.run(table, batches(3, WRITES_IN_FLIGHT_BYTES_MAX // 2))
        self.await_calls(backend, 1)
        assert not backend.called.acquire(timeout=0.02)
        backend.complete(1)
        self.await_calls(backend, 1)
        backend.complete(2)
        self.await_calls(backend, 1)
        backend.complete(3)
        assert outcome.result(timeout=30) == 3

    def test_waits_for_its_own_writes_when_the_queue_is_full(self, table: Table, backend: ScriptedBackend) -> None:
        backend.refuse = lambda call: UnavailableError("full") if call in (3, 4) else None
        outcome = self.run(table, batches(3))
        self.await_calls(backend, 2)
        backend.complete(1)
        backend.complete(2)
        self.await_calls(backend, 1)
        assert [batch.column("id")[0].as_py() for batch, _ in backend.flying] == [2]
        backend.complete(3)
        assert outcome.result(timeout=30) == 3

    def test_unavailable_with_nothing_in_flight_is_the_callers(self, table: Table, backend: ScriptedBackend) -> None:
        backend.refuse = lambda call: UnavailableError("no leader")
        with pytest.raises(UnavailableError, match="no leader") as caught:
            table.write(batches(2))
        assert caught.value.__notes__ == ["at batch 1 of the stream into table 'people'"]
        assert backend.calls == 1

    def test_first_error_is_raised_when_nothing_flies_any_more(self, table: Table, backend: ScriptedBackend) -> None:
        outcome = self.run(table, batches(4))
        self.await_calls(backend, 4)
        backend.complete(1)
        backend.complete(OutcomeUnknownError("lost"))
        backend.complete(UnavailableError("later"))
        assert not outcome.done()
        backend.complete(4)
        with pytest.raises(OutcomeUnknownError, match="lost") as caught:
            outcome.result(timeout=30)
        assert caught.value.__notes__ == ["at batch 2 of the stream into table 'people'"]

    def test_wrong_batch_in_the_stream(self, table: Table, backend: ScriptedBackend) -> None:
        wrong = pa.RecordBatch.from_arrays(
            [pa.nulls(1, pa.int64()), pa.array(["a"]), pa.array([0.0])], names=SCHEMA.names
        )
        outcome = self.run(table, pa.Table.from_batches([people((1, "a", 0.0)), wrong, people((2, "a", 0.0))]))
        self.await_calls(backend, 1)
        backend.complete(2)
        with pytest.raises(UsageError, match="is null in row 0") as caught:
            outcome.result(timeout=30)
        assert caught.value.__notes__ == ["at batch 2 of the stream into table 'people'"]
        assert backend.calls == 1


def test_a_write_that_is_never_decided_ends_as_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "ANSWER_TIMEOUT_S", 0.01)
    with pytest.raises(OutcomeUnknownError, match="may still take effect"):
        window.outcome(Future())
