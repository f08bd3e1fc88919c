"""Clients of a cluster, as a program: they write and read all the time, and tell on standard output what they asked and were answered.

Each line is one JSON object. ``call`` is the number of an operation that begins (with ``client``, ``kind``, ``key``, ``value``, ``row``),
``end`` of one that ends, with its ``answer``, or with ``refused`` (nothing was done) or ``unknown``. Lines are written under one
lock, before a call and after its answer, so that their order is one in which all of it happened. On standard input come
commands, each with a number under which it is answered: see `_Clients.obey`.

Every write sets one of a few registers (rows 0 to `keys`) to a number that no other write uses, and adds a row of its own whose key
that number is: the registers show whether what happened can be put in one order, the rows whether anything that was acknowledged is gone.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

import marble
from marble.errors import MarbleError, OutcomeUnknownError, UnavailableError
from marble.transport.wire import decode_acks

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("value", pa.int64())])
FIRST_ROW = 1000
THINK_S = 0.03
PROBE_TIMEOUT_S = 1.0
PROBE_PAUSE_S = 0.02


class _Clients:
    """All of them.

    - ``settings``: ``url``, ``table``, ``endpoints`` (node -> ``host:port``), ``timeout_s``, ``writers``, ``readers``, ``keys``, ``seed``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._operations = 0
        self._values = FIRST_ROW
        self._stop = threading.Event()
        self._probed = f"{settings['table']}_probed"

    def say(self, **line: Any) -> None:
        with self._lock:
            print(json.dumps(line), flush=True)

    def run(self) -> None:
        """Create the table, start everybody, and obey until the input ends or says so."""
        with marble.connect(self._settings["url"], timeout_s=60.0) as db:
            db.create_table(self._settings["table"], SCHEMA, key=["id"])
            db.create_table(self._probed, SCHEMA, key=["id"])
        threads = [
            threading.Thread(target=self._guarded, args=(action, f"{action.__name__[1:]}-{number}"))
            for action, count in ((self._writer, self._settings["writers"]), (self._reader, self._settings["readers"]))
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "end":
                break
            threading.Thread(target=self._guarded, args=(self.obey, command), daemon=True).start()
        self._stop.set()
        for thread in threads:
            thread.join()
        with marble.connect(self._settings["url"], timeout_s=60.0) as db:
            self._finish(db.table(self._settings["table"]))
        self.say(reply=0, done=True)

    def _guarded(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except BaseException:
            self.say(failure=traceback.format_exc())
            raise

    def obey(self, command: dict[str, Any]) -> None:
        """``status``: what the node at this endpoint says of itself, or null; ``write``: how one impatient write ended; ``through``:
        when a linearizable read and a write, asked of the node at this endpoint and of no other, had their answers.
        """
        match command["do"]:
            case "through":
                with flight.connect(f"grpc://{command['endpoint']}") as client:
                    self.say(
                        reply=command["reply"], read=self._until(client, "get"), write=self._until(client, "upsert")
                    )
            case "status":
                self.say(reply=command["reply"], status=self._status(command["endpoint"]))
            case "write":
                with marble.connect(f"grpc://{command['endpoint']}", timeout_s=command["timeout_s"]) as db:
                    error = self._write(f"impatient-{command['reply']}", lambda: db.table(self._settings["table"]))
                self.say(reply=command["reply"], error=error)

    def _until(self, client: flight.FlightClient, verb: str) -> float:
        """Ask the node again and again; when it answered. Not in the history: these rows are in a table of their own."""
        rows = pa.record_batch({"id": [1], "value": [1]}, schema=SCHEMA)
        batch = rows.select(["id"]) if verb == "get" else rows
        while True:
            try:
                descriptor = flight.FlightDescriptor.for_path(self._probed, verb)
                writer, reader = client.do_exchange(descriptor, flight.FlightCallOptions(timeout=PROBE_TIMEOUT_S))
                with writer:
                    writer.begin(batch.schema)
                    writer.write_batch(batch)
                    writer.done_writing()
                    chunk = reader.read_chunk()
                    if verb == "get" or decode_acks(chunk.app_metadata)[0].error() is None:
                        return time.monotonic()
            except (pa.ArrowException, OSError, StopIteration):
                self._stop.wait(PROBE_PAUSE_S)

    def _status(self, endpoint: str) -> dict[str, Any] | None:
        try:
            with marble.connect(f"grpc://{endpoint}", timeout_s=1.0) as db:
                status = db.status()
        except MarbleError:
            return None
        return {name: status[name] for name in ("leader_id", "role", "term", "commit_index", "applied_index")}

    def _begin(self, client: str, kind: str, **what: Any) -> int:
        with self._lock:
            self._operations += 1
            line = {"call": self._operations, "client": client, "kind": kind, "at": time.monotonic(), **what}
            print(json.dumps(line), flush=True)
            return self._operations

    def _writer(self, name: str) -> None:
        with marble.connect(self._settings["url"], timeout_s=self._settings["timeout_s"]) as db:
            table = db.table(self._settings["table"])
            while not self._stop.wait(random.random() * 2 * THINK_S):
                self._write(name, lambda: table)

    def _write(self, client: str, table: Callable[[], marble.Table]) -> str:
        """One write, recorded; the name of the error that it ended in, or nothing."""
        with self._lock:
            self._values += 1
            value = self._values
        key = random.randrange(self._settings["keys"])
        number = self._begin(client, "write", key=key, value=value)
        try:
            table().write(pa.record_batch({"id": [key, value], "value": [value, value]}, schema=SCHEMA))
        except OutcomeUnknownError as error:
            self.say(end=number, unknown=type(error).__name__, text=str(error))
            return type(error).__name__
        except UnavailableError as error:
            self.say(end=number, refused=type(error).__name__, text=str(error))
            return type(error).__name__
        self.say(end=number, answer=None, at=time.monotonic())
        return ""

    def _reader(self, name: str) -> None:
        with marble.connect(self._settings["url"], timeout_s=self._settings["timeout_s"]) as db:
            table = db.table(self._settings["table"])
            while not self._stop.wait(random.random() * 2 * THINK_S):
                self._read(name, table, random.randrange(self._settings["keys"]))

    def _read(self, client: str, table: marble.Table, key: int) -> None:
        number = self._begin(client, "read", key=key)
        try:
            row = table.get(key)
        except UnavailableError as error:
            self.say(end=number, refused=type(error).__name__, text=str(error))
        else:
            self.say(end=number, answer=None if row is None else row["value"], at=time.monotonic())

    def _finish(self, table: Any) -> None:
        """All that there is in the end."""
        number = self._begin("last", "scan")
        rows = table.scan().to_table()
        found = dict(zip(rows["id"].to_pylist(), rows["value"].to_pylist(), strict=True))
        self.say(end=number, answer=[[key, value] for key, value in found.items()], at=time.monotonic())


if __name__ == "__main__":
    _settings = json.loads(sys.argv[1])
    random.seed(_settings["seed"])
    _Clients(_settings).run()
