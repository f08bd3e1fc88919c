"""``marble demo`` as a user runs it: three real nodes, a real SIGKILL, a real comparison; and Ctrl-C."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

ROWS = 3000
DEADLINE_S = 180


def write_orders(tmp_path: Path) -> Path:
    """Rows with nulls, NaN and nested values, whose file is not sorted by its key."""
    numbers = list(range(ROWS))
    table = pa.table(
        {
            "note": pa.array([None if n % 7 == 0 else f"note {n}" for n in numbers]),
            "price": pa.array([float("nan") if n % 11 == 0 else n / 3 for n in numbers]),
            "region": pa.array([f"r{n % 5}" for n in numbers]).dictionary_encode(),
            "id": pa.array([(n * 7919) % ROWS for n in numbers], pa.int32()),
            "tags": pa.array([[str(n)] * (n % 3) for n in numbers]),
        }
    )
    path = tmp_path / "orders.parquet"
    pyarrow.parquet.write_table(table, path)
    return path


ON_A_TERMINAL = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from marble.cli import main; sys.exit(main())"
)
"""A shell starts what it runs in the background with SIGINT ignored; a test must not depend on where it runs."""


def demo(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-c", ON_A_TERMINAL, "demo", *arguments]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_leader_loses_nothing(tmp_path: Path) -> None:
    path = write_orders(tmp_path)
    command = demo("--file", str(path), "--key", "region,id", "--batch-rows", "100", "--keep", str(tmp_path / "kept"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "killed node" in done.stdout
    for node in (1, 2, 3):
        assert f"node {node}: 3,000 rows, identical with the source" in done.stdout
        assert (tmp_path / "kept" / f"node-{node}" / "log").is_dir()
    assert done.stdout.splitlines()[-1].startswith("PASSED: 3,000 rows on each of 3 replicas")
    assert not any(is_alive(int(pid)) for pid in re.findall(r"process (\d+)", done.stdout))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = demo("--file", str(write_orders(tmp_path)), "--key", "id", "--batch-rows", "1")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        pids = []
        for line in process.stdout:
            pids += [int(pid) for pid in re.findall(r"^node \d+: process (\d+)", line)]
            if line.startswith("writing"):
                break
        assert len(pids) == 3
        nodes = [os.pidfd_open(pid) for pid in pids]
        process.send_signal(number)
        process.stdout.read()
        errors = process.stderr.read()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert errors == ""
    for node in nodes:
        assert wait_for_end(node)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("marble-demo-")]
    assert len(left) == (1 if number == signal.SIGKILL else 0)


def wait_for_end(node: int) -> bool:
    """Whether the process behind this descriptor ends within the deadline. It need not be our child."""
    ended = bool(select.select([node], [], [], DEADLINE_S)[0])
    os.close(node)
    return ended
