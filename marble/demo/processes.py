"""Nodes as operating-system processes that never outlive the demo.

Rule 1: whoever starts a `Nodes` leaves no process behind, however it ends: on the way out of its ``with`` block every
child is stopped, then killed. If the demo itself is killed, the kernel kills the children
(``marble serve --exit-with-parent``).

- A child has its own process group, so that Ctrl-C reaches the demo alone, which then stops the children in order.
- A child says on its first line of output that it is ready; what it writes to stderr goes to a file.
- One thread at a time; and it must live as long as the children, since Linux ends them with the thread that made them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, TextIO

from marble.errors import UnavailableError

START_TIMEOUT_S: Final = 60.0
"""How long a node may take from its start, over the replay of its log, to its first line: far above what is needed."""

STOP_TIMEOUT_S: Final = 10.0
"""How long a node may take to end after SIGTERM before it is killed."""

PORTS_MIN: Final = 15_000
PORTS_MAX: Final = 32_000
"""Outgoing connections take their ports from 32768 on: none of those can take the port of a dead node."""

_START_ATTEMPTS: Final = 5
"""Each fails only if another program takes a port within the second before our node does."""


class NodeProcess:
    """One node's process, which may be started, killed and started again.

    Parameters
    ----------
    name
        How messages call it.
    command
        Program and arguments. Its first line on stdout says that it is ready; the rest of its stdout is ignored.
    log_path
        Where its stderr is appended.
    """

    def __init__(self, name: str, command: Sequence[str], log_path: Path) -> None:
        self.name = name
        self.ready_line = ""
        self._command = list(command)
        self._log_path = log_path
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._first_line = threading.Event()

    @property
    def pid(self) -> int | None:
        """Its process id, or None while it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the process without waiting for it."""
        self.kill()
        self.ready_line = ""
        self._first_line = threading.Event()
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                process_group=0,
            )
        stdout = self._process.stdout
        if stdout is not None:
            self._reader = threading.Thread(
                target=self._read, args=(stdout, self._first_line), name=f"marble-demo-{self.name}", daemon=True
            )
            self._reader.start()

    def _read(self, stdout: TextIO, first_line: threading.Event) -> None:
        # Reads on after the first line, or a full pipe would stop the child.
        with stdout:
            self.ready_line = stdout.readline().strip()
            first_line.set()
            for _ in stdout:
                continue

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when the process has said that it is ready.

        Raises
        ------
        UnavailableError
            If it ended instead, or said nothing in time; with the end of its log.
        """
        if not self._first_line.wait(timeout_s):
            raise UnavailableError(f"{self.name} was not ready within {timeout_s:g} s{self._tail()}")
        if not self.ready_line:
            # End of file: it has closed its output, so it ends now.
            code = self._wait(STOP_TIMEOUT_S)
            raise UnavailableError(f"{self.name} ended ({describe_exit(code)}) before it was ready{self._tail()}")

    def check_alive(self) -> None:
        """Raise UnavailableError, with the end of its log, if the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise UnavailableError(f"{self.name} has ended ({describe_exit(self._process.returncode)}){self._tail()}")

    def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone. Does nothing if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._join()

    def request_stop(self) -> None:
        """Send SIGTERM, without waiting."""
        if self._process is not None:
            self._process.terminate()

    def wait_stopped(self, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Wait for its end after `request_stop`. Kills it if it takes longer.

        Returns
        -------
        int or None
            Its exit status, negative for a signal; None if it never ran.
        """
        code = self._wait(timeout_s)
        self._join()
        return code

    def _wait(self, timeout_s: float) -> int | None:
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _join(self) -> None:
        if self._reader is not None:
            self._reader.join(STOP_TIMEOUT_S)

    def _tail(self) -> str:
        try:
            lines = self._log_path.read_text(errors="replace").splitlines()[-5:]
        except OSError:
            return ""
        return "".join(f"\n  {line}" for line in ["", *lines] if line)


class Nodes:
    """All processes of a cluster; a context manager at whose end none runs.

    Parameters
    ----------
    processes
        The nodes, by id.
    """

    def __init__(self, processes: dict[int, NodeProcess]) -> None:
        self.processes = processes

    def __enter__(self) -> Nodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # SIGKILL first would be simplest and safe for the data, but an orderly end is what --keep promises.
        try:
            self.stop(STOP_TIMEOUT_S if error is None else 2.0)
        finally:
            for process in self.processes.values():
                process.kill()

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start all and wait until all are ready. Raises UnavailableError if one is not."""
        for process in self.processes.values():
            process.start()
        end = time.monotonic() + timeout_s
        for process in self.processes.values():
            process.wait_ready(max(0.0, end - time.monotonic()))

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[int, int | None]:
        """Stop all at once; kill what has not ended after `timeout_s`. Returns the exit status of each."""
        for process in self.processes.values():
            process.request_stop()
        end = time.monotonic() + timeout_s
        return {
            node: process.wait_stopped(max(0.0, end - time.monotonic())) for node, process in self.processes.items()
        }

    def check_alive(self, except_for: Sequence[int] = ()) -> None:
        """Raise UnavailableError if a node has ended that is not among `except_for`."""
        for node, process in self.processes.items():
            if node not in except_for:
                process.check_alive()


@contextlib.contextmanager
def running_on_free_ports(count: int, make: Callable[[Sequence[int]], Nodes]) -> Iterator[tuple[Nodes, Sequence[int]]]:
    """Start `count` nodes on ports that are free, with new ones if another program is quicker.

    Parameters
    ----------
    make
        Gives the nodes for the ports.

    Yields
    ------
    tuple of Nodes and ports
        Running and ready; none runs after the ``with`` block.

    Raises
    ------
    UnavailableError
        If a node does not start and its port is not the reason.
    """
    for attempt in range(1, _START_ATTEMPTS + 1):
        ports = find_free_ports(count)
        nodes = make(ports)
        with nodes:
            try:
                nodes.start()
            except UnavailableError:
                # With our own nodes gone, a port that is still taken is taken by someone else.
                nodes.stop(0.0)
                if attempt == _START_ATTEMPTS or all(_is_free(port) for port in ports):
                    raise
                continue
            yield nodes, ports
            return


def find_free_ports(count: int) -> Sequence[int]:
    """Different loopback ports on which nothing listens at this moment."""
    candidates = random.SystemRandom().sample(range(PORTS_MIN, PORTS_MAX), 50 * count)
    free = [port for _, port in zip(range(count), filter(_is_free, candidates), strict=False)]
    if len(free) < count:
        raise UnavailableError(f"no {count} free ports were found between {PORTS_MIN} and {PORTS_MAX}")
    return free


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that lingers in TIME_WAIT does not make a port unusable.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
        return True


def serve_command(config_path: Path) -> list[str]:
    """The command that runs a node as our child."""
    # -P: a folder named marble where the user happens to stand must not be imported instead of marble.
    return [
        *(sys.executable, "-P", "-m", "marble.cli", "serve"),
        *("--config", str(config_path), "--exit-with-parent", str(os.getpid())),
    ]


def describe_exit(code: int | None) -> str:
    """``exit status 1`` or ``SIGKILL``."""
    if code is None:
        return "never started"
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
