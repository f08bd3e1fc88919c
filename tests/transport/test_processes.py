"""The transport and the processes around it: exits, forks, and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

from marble.transport.codec import Codec
from marble.transport.flight import FlightTransport
from marble.transport.options import TransportOptions

DEADLINE_S = 30.0
CODEC = Codec("c", 2, 1 << 20)


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-X", "faulthandler", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        # gRPC's C++ code notes on stderr that a peer went away.
        env=os.environ | {"GRPC_VERBOSITY": "NONE"},
    )


START = """
import os, sys, threading
from marble.transport.flight import FlightTransport
got = threading.Event()
one = FlightTransport("127.0.0.1:0", "c", 1)
two = FlightTransport("127.0.0.1:0", "c", 2)
for transport in (one, two):
    transport.set_peers({1: one.endpoint, 2: two.endpoint})
    transport.start(lambda envelopes: got.set())
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Envelope
while not got.wait(0.01):
    one.send(2, [Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1))])
"""


def test_interpreter_exits_although_nothing_was_stopped() -> None:
    done = run(START + "print('end')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_interpreter_exits_after_an_error() -> None:
    done = run(START + "raise SystemExit(3)")
    assert (done.returncode, done.stderr) == (3, "")


def test_forked_child_is_told_and_exits() -> None:
    done = run(
        START
        + """
child = os.fork()
if child == 0:
    from marble.errors import UsageError
    for use in (lambda: one.send(2, []), lambda: one.set_peers({}), lambda: one.start(print)):
        try:
            use()
        except UsageError as error:
            assert "forked child" in str(error)
        else:
            sys.exit(9)
    assert one.stop(1.0)
    sys.exit(7)
_, status = os.waitpid(child, 0)
got.clear()
one.send(2, [Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1))])
assert got.wait(30)
print(os.waitstatus_to_exitcode(status), one.stop(5.0), two.stop(5.0))
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "7 True True\n", "")


def test_killed_peer_is_noticed() -> None:
    """A process that is killed says nothing; its kernel does."""
    script = START + "print(one.port, flush=True); threading.Event().wait()"
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert child.stdout is not None
        endpoint = f"127.0.0.1:{int(child.stdout.readline())}"
        broken = threading.Event()
        options = TransportOptions(idle_check_s=0.05, backoff_min_s=0.01, backoff_max_s=0.05)
        two = FlightTransport("127.0.0.1:0", "c", 2, options=options)
        two.set_peers({1: endpoint})
        two.start(lambda envelopes: None, unreachable=lambda peer: broken.set())
        deadline = time.monotonic() + DEADLINE_S
        while not two.connected(1):
            assert time.monotonic() < deadline
            threading.Event().wait(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait(DEADLINE_S)
        assert broken.wait(DEADLINE_S)
        assert two.stop(5.0)
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
