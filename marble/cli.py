"""The command ``marble``: demo, serve, log, status, doctor, members, transfer, snapshot, backup, restore, verify, certs, token, simulate,
version.

Rule 1: a command ends with 0 when it did what was asked, 1 when it failed, 2 when it was asked wrongly, and 128 plus
its number when a signal ended it. A failure says on stderr what is wrong; only what nobody foresaw shows a traceback.

What a command needs is imported when it runs, so that ``marble --help`` is quick and ``marble serve`` loads no demo.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from marble.backup_commands import add_backup_commands
from marble.certs import add_certs_commands, add_papers_options, papers
from marble.errors import InvariantError, MarbleError, UsageError
from marble.status_commands import add_status_commands

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

_PR_SET_PDEATHSIG: Final = 1
SNAPSHOT_TIMEOUT_S: Final = 600.0
"""How long the nodes may take to write their snapshots."""

_ALIVE_CHECK_S: Final = 0.5
"""How often a serving process looks whether its engine still runs, and whether there is nothing else to do than to tidy up."""


class _Stopped(BaseException):
    """A signal asks the process to end. Not an Exception, so that nothing on the way out mistakes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's own) and return the exit status."""
    # gRPC reads this when its first channel is made. What happens is our news to tell, in our words, and not more often than ours: gRPC
    # writes lines of its own between them, one for each stranger who asks a TLS port for a name that it has not.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    parser = _parser()
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        with papers(options):
            return command(options)
    except UsageError as error:
        _complain(error)
        return EXIT_USAGE
    except (MarbleError, OSError) as error:
        _complain(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except _Stopped as stopped:
        return 128 + stopped.number


def _complain(error: Exception) -> None:
    print(f"marble: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marble", description="Replicated Arrow tables inside a Python process.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="three nodes, real data, a killed leader, every value compared",
        description="Start nodes as processes of their own, write real data through the Flight client, kill the leader "
        "halfway, restart it, and compare every value on every replica with the source.",
    )
    demo.add_argument("--rows", type=int, metavar="N", help="write only the first N rows")
    demo.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (default: %(default)s)")
    demo.add_argument(
        "--batch-rows", type=int, default=1000, metavar="N", help="rows in one write (default: %(default)s)"
    )
    demo.add_argument("--file", type=Path, metavar="PATH", help="a .parquet, .csv or .arrow file, not the flights")
    demo.add_argument("--key", metavar="A,B", help="with --file: the columns that name a row")
    demo.add_argument("--keep", type=Path, metavar="DIR", help="leave the nodes' data and logs in this directory")
    demo.add_argument("--no-kill", action="store_true", help="do not kill the leader")
    demo.set_defaults(command=_demo)

    _add_serve(commands)
    log = commands.add_parser(
        "log",
        help="print the log of a node as a table",
        description="Print every row of the log below a data directory. It is only read, also while a node uses it.",
    )
    log.add_argument("directory", type=Path, metavar="DIR", help="a node's data directory")
    log.set_defaults(command=_log)

    _add_operator_commands(commands)
    simulate = commands.add_parser(
        "simulate",
        help="play simulated clusters under faults and check what Raft promises",
        description="Play histories of a whole cluster in one thread, on a simulated network, disks and clocks, under faults, and check "
        "after each event what Raft promises and at the end that one order explains what clients saw. One seed is one history.",
    )
    simulate.add_argument(
        "--seeds", type=int, metavar="N", help="how many histories (default: 100, or until --minutes are over)"
    )
    simulate.add_argument(
        "--first-seed", type=int, default=1, metavar="S", help="seed of the first history (default: %(default)s)"
    )
    simulate.add_argument("--minutes", type=float, metavar="M", help="begin no history after this time")
    simulate.add_argument(
        "--nodes", type=int, default=0, metavar="N", help="how many nodes, if not as many as the plan says"
    )
    simulate.add_argument(
        "--steps", type=int, default=10_000, metavar="N", help="events before all faults end (default: %(default)s)"
    )
    simulate.add_argument(
        "--plan", default="swarm", metavar="NAME", help="swarm (a mix drawn by each seed, the default), all, or a plan"
    )
    simulate.add_argument("--jobs", type=int, default=1, metavar="J", help="processes (default: %(default)s)")
    simulate.set_defaults(command=_simulate)

    add_papers_options(commands)
    parser.add_argument("--version", action=_Version, nargs=0, help="the same as `marble version`")
    version = commands.add_parser("version", help="print the versions of marble, pyarrow and Python")
    version.set_defaults(command=_version)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="run one node", description="Run one node until SIGTERM or Ctrl-C.")
    serve.add_argument("--config", type=Path, required=True, metavar="FILE", help="the node's config (TOML)")
    serve.add_argument(
        "--log-level",
        metavar="LEVEL",
        help="debug, info, warning, error or critical (default: the config's, or info)",
    )
    serve.add_argument("--log-json", action="store_true", help="log one JSON object a line")
    serve.add_argument(
        "--exit-with-parent", type=int, metavar="PID", help="let the kernel end this node when its parent PID ends"
    )
    serve.set_defaults(command=_serve)


def _add_operator_commands(commands: Any) -> None:
    url = "grpc://host:port,host:port of some or all nodes"
    members = commands.add_parser(
        "members",
        help="show who takes part in a cluster, or change it",
        description="Show who takes part in a cluster. With options: change it first, all of them in one step.",
    )
    members.add_argument("url", metavar="URL", help=url)
    members.add_argument(
        "--add",
        type=_place,
        action="append",
        default=[],
        metavar="ID=HOST:PORT",
        help="add a voter (it has join = true)",
    )
    members.add_argument(
        "--learner", type=_place, action="append", default=[], metavar="ID=HOST:PORT", help="add a node without a vote"
    )
    members.add_argument(
        "--promote", type=int, action="append", default=[], metavar="ID", help="make a learner a voter"
    )
    members.add_argument("--demote", type=int, action="append", default=[], metavar="ID", help="make a voter a learner")
    members.add_argument("--remove", type=int, action="append", default=[], metavar="ID", help="remove a node")
    members.add_argument(
        "--transition",
        choices=("auto", "joint", "explicit"),
        default="auto",
        help="explicit: stay with both majorities until --leave (default: %(default)s)",
    )
    members.add_argument("--leave", action="store_true", help="end an explicit transition")
    members.add_argument("--local", action="store_true", help="show what one node knows, also without a majority")
    members.set_defaults(command=_members)

    transfer = commands.add_parser("transfer", help="let another node lead")
    transfer.add_argument("url", metavar="URL", help=url)
    transfer.add_argument("--to", type=int, required=True, metavar="ID", help="a voter")
    transfer.set_defaults(command=_transfer)

    snapshot = commands.add_parser("snapshot", help="let each node of the URL write a snapshot and shorten its log")
    snapshot.add_argument("url", metavar="URL", help=url)
    snapshot.set_defaults(command=_snapshot)
    add_backup_commands(commands, _place)
    add_status_commands(commands)
    add_certs_commands(commands)


def _place(text: str) -> tuple[int, str]:
    node, equals, endpoint = text.partition("=")
    if not equals or not node.isascii() or not node.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=HOST:PORT")
    return int(node), endpoint


# -- demo --------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from marble.client import connect
    from marble.demo.display import choose_display
    from marble.demo.scenario import DemoOptions, run_demo
    from marble.demo.source import load_file, load_flights

    if options.rows is not None and options.rows < 1:
        raise UsageError(f"--rows {options.rows}: there must be 1 or more")
    if (options.file is None) != (options.key is None):
        raise UsageError("--file and --key belong together: the key names the rows of the file")
    with _signals_raise():
        source = (
            load_flights(options.rows)
            if options.file is None
            else load_file(options.file, options.key.split(","), options.rows)
        )
        chosen = DemoOptions(source, options.nodes, options.batch_rows, options.keep, not options.no_kill)
        return EXIT_OK if run_demo(chosen, choose_display(), connect) else EXIT_FAILED


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that what was started is stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    # Under nohup the end of the terminal is to be ignored, and stays so.
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- serve -------------------------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> int:
    if options.exit_with_parent is not None:
        _die_with_parent(options.exit_with_parent)
    from marble.config import load_config
    from marble.logs import check_level, initialize_logging
    from marble.memory import Housekeeper, keep_freed_memory
    from marble.server import server_from_config

    if options.log_level is not None:
        check_level(options.log_level, "--log-level")
    config = load_config(options.config)
    json_lines = options.log_json or config.log_format == "json"
    initialize_logging(options.log_level or config.log_level, json_lines=json_lines, node=config.id)
    # Before anything large is taken: what was mapped until then glibc gives back as it always does.
    keep_freed_memory()
    housekeeper = Housekeeper(time.monotonic, time.process_time)
    server = server_from_config(config)
    # Until the server runs, a signal ends the process at once: that is a crash, and a crash is safe at any moment.
    server.start()
    signal.signal(signal.SIGHUP, lambda number, frame: server.reload())
    with contextlib.closing(_Signals((signal.SIGTERM, signal.SIGINT))) as signals:
        try:
            print(
                f"marble: node {config.id} listens on {config.listen_endpoint}, data in {config.data_dir}", flush=True
            )
            if server.page_url is not None:
                print(f"marble: its page is {server.page_url}", flush=True)
            while not signals.wait(_ALIVE_CHECK_S):
                if not server.is_running():
                    raise InvariantError(f"node {config.id} has stopped by itself: {server.failure}")
                housekeeper.look()
        finally:
            server.stop()
    return EXIT_OK


class _Signals:
    """Signals turned into something to wait for.

    The handler writes to a pipe and does nothing else: a lock that it took could be held by what it interrupts.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A full pipe has been noted often enough.
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")

    def wait(self, timeout_s: float) -> bool:
        """Whether a signal has come; waits for one."""
        return bool(select.select([self._read], [], [], timeout_s)[0])

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)


def _die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, in whatever way that happens."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl: {os.strerror(code)}")
    # The parent may have ended before the request was made.
    if os.getppid() != parent:
        raise UsageError(f"--exit-with-parent {parent}: the parent of this process is {os.getppid()}")


# -- log, version ------------------------------------------------------------------------------------------------------


def _log(options: argparse.Namespace) -> int:
    from marble.env import SystemFiles
    from marble.logstore.scan import RecoveryReport
    from marble.logstore.show import rows

    if not (options.directory / "log").is_dir():
        raise UsageError(f"{options.directory} is not a node's data directory: it has no log")

    def report(found: RecoveryReport) -> None:
        if found.cut_path is not None:
            # Not an error: a crash in the middle of a write looks like this, and a node cuts it off when it starts.
            print(f"torn tail: {found.cut_bytes} bytes of {found.cut_path} from offset {found.cut_offset}")
        if found.lost_durable_bytes:
            print(f"lost: {found.lost_durable_bytes} bytes that had been durable are missing at the end")

    try:
        _print_table(rows(SystemFiles(options.directory), report))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (``| head``) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _print_table(rows: Iterable[Any]) -> None:
    """Print dataclasses, one a line, without holding them all: columns only ever get wider."""
    widths: list[int] = []
    for row in rows:
        cells = [str(getattr(row, field.name)) for field in dataclasses.fields(row)]
        if not widths:
            names = [field.name for field in dataclasses.fields(row)]
            widths = [max(len(name), len(cell)) for name, cell in zip(names, cells, strict=True)]
            print(_line(names, widths))
        widths = [max(width, len(cell)) for width, cell in zip(widths, cells, strict=True)]
        print(_line(cells, widths))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _print_columns(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(_line(line, widths))


# -- members, transfer, snapshot ---------------------------------------------------------------------------------------


def _members(options: argparse.Namespace) -> int:
    from marble.admin import ClusterAdmin
    from marble.types import Change, ChangeKind, Transition

    kinds = (
        (ChangeKind.ADD_VOTER, [node for node, _ in options.add] + options.promote),
        (ChangeKind.ADD_LEARNER, [node for node, _ in options.learner] + options.demote),
        (ChangeKind.REMOVE, options.remove),
    )
    changes = [Change(kind, node) for kind, nodes in kinds for node in nodes]
    if changes and options.leave:
        raise UsageError("--leave ends a transition and goes with no other change")
    with ClusterAdmin(options.url) as admin:
        if changes or options.leave:
            places = dict([*options.add, *options.learner])
            admin.change_membership(changes, places, Transition(options.transition))
        found = admin.members(consistency="local" if options.local else "linearizable")
    lines = [("node", "part", "endpoint")]
    lines += [(str(node), part, found.endpoints.get(node, "-")) for node, part in found.parts.items()]
    _print_columns(lines)
    if found.members.joint and not found.members.auto_leave:
        print("two majorities decide until: marble members URL --leave")
    return EXIT_OK


def _transfer(options: argparse.Namespace) -> int:
    from marble.admin import ClusterAdmin

    with ClusterAdmin(options.url) as admin:
        admin.transfer_leadership(options.to)
    print(f"node {options.to} leads")
    return EXIT_OK


def _snapshot(options: argparse.Namespace) -> int:
    from marble.admin import ClusterAdmin

    with ClusterAdmin(options.url, timeout_s=SNAPSHOT_TIMEOUT_S) as admin:
        lines = [("endpoint", "snapshot")]
        lines += [(endpoint, str(index)) for endpoint, index in admin.take_snapshots().items()]
    _print_columns(lines)
    return EXIT_OK


# -- simulate ----------------------------------------------------------------------------------------------------------


def _simulate(options: argparse.Namespace) -> int:
    from marble.simulate import run

    with _signals_raise():
        return EXIT_OK if run(options) else EXIT_FAILED


# -- version -----------------------------------------------------------------------------------------------------------


class _Version(argparse.Action):
    """What `marble version` does, and no more."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        parser.exit(_version(namespace))


def _version(options: argparse.Namespace) -> int:
    import importlib.metadata
    import platform

    import pyarrow

    marble = importlib.metadata.version("marbledb")
    print(f"marble {marble}, pyarrow {pyarrow.__version__}, Python {platform.python_version()}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
