"""Children of the demo: ready when they say so, gone when the demo is, whatever ends it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from marble.demo.processes import (
    NodeProcess,
    Nodes,
    describe_exit,
    find_free_ports,
    running_on_free_ports,
    serve_command,
)
from marble.errors import UnavailableError

WAITS = "import signal, sys; print('ready', flush=True); signal.sigwait([signal.SIGTERM]); print('bye')"
"""A child that ends in order on SIGTERM."""

BLOCKED = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); "
"""Before WAITS: the signal waits for `sigwait` instead of ending the child."""

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"


def child(tmp_path: Path, code: str, name: str = "node 1") -> NodeProcess:
    return NodeProcess(name, [sys.executable, "-P", "-c", code], tmp_path / f"{name}.log")


def is_alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_is_ready_when_it_says_so(tmp_path: Path) -> None:
    process = child(tmp_path, BLOCKED + WAITS)
    with Nodes({1: process}) as nodes:
        nodes.start(timeout_s=60)
        assert process.ready_line == "ready"
        assert is_alive(process.pid)
        nodes.check_alive()
        assert nodes.stop(timeout_s=60) == {1: 0}
        assert process.pid is None


def test_a_child_can_be_killed_and_started_again(tmp_path: Path) -> None:
    process = child(tmp_path, BLOCKED + WAITS)
    with Nodes({1: process}) as nodes:
        nodes.start(60)
        first = process.pid
        process.kill()
        assert process.pid is None
        with pytest.raises(UnavailableError, match=r"node 1 has ended \(SIGKILL\)"):
            nodes.check_alive()
        nodes.check_alive(except_for=[1])
        process.start()
        process.wait_ready(60)
        assert process.pid not in (None, first)


def test_a_child_that_ends_before_it_is_ready_shows_the_end_of_its_log(tmp_path: Path) -> None:
    process = child(tmp_path, "import sys; sys.exit('marble: the disk is full')")
    with Nodes({1: process}) as nodes, pytest.raises(UnavailableError, match=r"ended \(exit status 1\)") as raised:
        nodes.start(60)
    assert "the disk is full" in str(raised.value)


def test_a_child_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    process = child(tmp_path, "import signal; signal.pause()")
    process.start()
    with Nodes({1: process}), pytest.raises(UnavailableError, match=r"not ready within 0\.01 s"):
        process.wait_ready(0.01)
    assert process.pid is None


def test_a_child_that_ignores_the_request_to_stop_is_killed(tmp_path: Path) -> None:
    with Nodes({1: child(tmp_path, STUBBORN)}) as nodes:
        nodes.start(60)
        assert nodes.stop(timeout_s=0.01) == {1: -signal.SIGKILL}


def test_much_output_after_the_first_line_does_not_block_a_child(tmp_path: Path) -> None:
    process = child(tmp_path, "print('ready')\nfor _ in range(20000): print('x' * 60)")
    process.start()
    process.wait_ready(60)
    assert process.wait_stopped(60) == 0


@pytest.mark.parametrize("reason", [KeyboardInterrupt, UnavailableError, SystemExit])
def test_no_child_is_left_whatever_ends_the_demo(tmp_path: Path, reason: type[BaseException]) -> None:
    processes = {node: child(tmp_path, BLOCKED + WAITS, f"node {node}") for node in (1, 2)}
    pids: list[int | None] = []
    with pytest.raises(reason):
        run_until(reason, processes, pids)
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def run_until(reason: type[BaseException], processes: dict[int, NodeProcess], pids: list[int | None]) -> None:
    with Nodes(processes) as nodes:
        nodes.start(60)
        pids += [process.pid for process in processes.values()]
        raise reason("over")


def test_an_interrupt_during_the_stop_still_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = {node: child(tmp_path, STUBBORN, f"node {node}") for node in (1, 2)}
    nodes = Nodes(processes)
    nodes.start(60)
    pids = [process.pid for process in processes.values()]

    def interrupted(timeout_s: float = 0.0) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes[1], "wait_stopped", interrupted)
    with pytest.raises(KeyboardInterrupt), nodes:
        pass
    assert not any(is_alive(pid) for pid in pids)


def test_ctrl_c_does_not_reach_the_children(tmp_path: Path) -> None:
    process = child(tmp_path, BLOCKED + WAITS)
    with Nodes({1: process}) as nodes:
        nodes.start(60)
        assert process.pid is not None
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0)


def test_children_die_with_a_demo_that_is_killed() -> None:
    """The grandchild holds the pipe open, so its end of file says that the kernel has ended it."""
    grandchild = (
        "import os, signal, sys; from marble.cli import _die_with_parent; _die_with_parent(int(sys.argv[1]));"
        "os.write(1, b'!'); signal.pause()"
    )
    parent = (
        "import os, signal, subprocess, sys;"
        f"subprocess.Popen([sys.executable, '-P', '-c', {grandchild!r}, str(os.getpid())]); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        assert os.read(descriptor, 1) == b"!"
        process.kill()
        assert select.select([descriptor], [], [], 60)[0], "the grandchild still holds its output"
        assert os.read(descriptor, 1) == b""


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    code = "from marble.cli import _die_with_parent; _die_with_parent(1)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "the parent of this process is" in done.stderr


def test_free_ports_are_different_and_free() -> None:
    ports = find_free_ports(9)
    assert len(set(ports)) == 9
    for port in ports:
        with socket.socket() as listener:
            # As servers do: another test's connection may linger there.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))


LISTENS = (
    "import signal, socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1);"
    "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen();"
    "print('ready', flush=True); signal.pause()"
)


def test_a_port_that_another_program_took_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        offered = iter([[taken.getsockname()[1]], find_free_ports(1)])
        monkeypatch.setattr("marble.demo.processes.find_free_ports", lambda count: next(offered))
        made: list[Sequence[int]] = []

        def make(ports: Sequence[int]) -> Nodes:
            made.append(ports)
            command = [sys.executable, "-P", "-c", LISTENS, str(ports[0])]
            return Nodes({1: NodeProcess("node 1", command, tmp_path / "log")})

        with running_on_free_ports(1, make) as (nodes, ports):
            assert len(made) == 2
            assert ports == made[1]
            pid = nodes.processes[1].pid
            assert is_alive(pid)
            nodes.processes[1].kill()
        assert not is_alive(pid)


def test_a_child_that_fails_on_a_free_port_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="exit status 3"):
        with running_on_free_ports(1, lambda ports: Nodes({1: child(tmp_path, "raise SystemExit(3)")})):
            pytest.fail("a dead node was taken for a ready one")


def test_a_node_is_told_its_parent_and_ignores_the_current_directory() -> None:
    command = serve_command(Path("/x/node.toml"))
    assert command[1:] == [
        "-P",
        "-m",
        "marble.cli",
        "serve",
        "--config",
        "/x/node.toml",
        "--exit-with-parent",
        str(os.getpid()),
    ]


def test_an_exit_is_described_in_words() -> None:
    assert [describe_exit(code) for code in (0, 1, -9, -64, -99, None)] == [
        "exit status 0", "exit status 1", "SIGKILL", "SIGRTMAX", "signal 99", "never started",
    ]  # fmt: skip
