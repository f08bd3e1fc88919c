"""The commands ``marble status`` and ``marble doctor``: how a cluster is, and what is wrong with it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from marble.errors import UsageError

if TYPE_CHECKING:
    from marble.doctor import Finding, Report
    from marble.watch import Board

_SCHEMES: Final = {"grpc://": False, "grpc+tcp://": False, "grpc+tls://": True, "grpcs://": True}
_SIGNS: Final = {"good": "ok", "note": "note", "warning": "WARNING", "problem": "PROBLEM"}
_COLOURS: Final = {"good": "32", "note": "36", "warning": "33", "problem": "31;1"}
_SIGN_WIDTH: Final = 9
_LINE_WIDTH_MAX: Final = 110


def add_status_commands(commands: Any) -> None:
    """Add the two to `commands`."""
    status = commands.add_parser(
        "status",
        help="show how the nodes of a cluster are, once or again and again",
        description="Ask all nodes of a cluster how they are. With --watch, draw it anew each second, with the last minutes: on a "
        "terminal as a screen, else one line each time. Ends with 1 if no node answers.",
    )
    status.add_argument("url", metavar="URL", help="grpc://host:port,host:port of some or all nodes")
    status.add_argument("--watch", action="store_true", help="until Ctrl-C")
    status.add_argument("--interval", type=float, default=1.0, metavar="S", help="with --watch (default: %(default)s)")
    status.add_argument("--count", type=int, metavar="N", help="with --watch: end after so many looks")
    status.add_argument("--json", action="store_true", help="print one JSON object a look")
    status.set_defaults(command=_status)
    doctor = commands.add_parser(
        "doctor",
        help="say in plain words what keeps a client from a node, or a cluster from working",
        description="Look at each node from the bottom up: its name, the connection, TLS, what answers, and then at what the nodes say of "
        "each other. Ends with 0 if nothing is wrong, with 1 if something is. Nothing is changed.",
    )
    doctor.add_argument(
        "nodes", metavar="HOST:PORT", help="one or more, with commas; grpc:// or grpc+tls:// before it is fine"
    )
    doctor.add_argument("--cluster-id", metavar="NAME", help="what the cluster should be called")
    doctor.add_argument("--only", action="store_true", help="do not go on to the nodes that these name")
    doctor.add_argument("--timeout", type=float, default=3.0, metavar="S", help="of each check (default: %(default)s)")
    doctor.add_argument("--ca", type=Path, metavar="FILE", help="certificates to trust (PEM; default: MARBLE_CA)")
    doctor.add_argument("--cert", type=Path, metavar="FILE", help="your own certificate (PEM; default: MARBLE_CERT)")
    doctor.add_argument("--key", type=Path, metavar="FILE", help="and its key (default: MARBLE_KEY)")
    doctor.add_argument("--server-name", metavar="NAME", help="the name to expect in the nodes' certificates")
    doctor.add_argument(
        "--token-file", type=Path, metavar="FILE", help="a file with your token (default: MARBLE_TOKEN_FILE)"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(command=_doctor)


# -- status ------------------------------------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    from marble.watch import open_board, table_of

    if not 0.1 <= options.interval <= 3600:
        raise UsageError(f"--interval {options.interval:g}: it must be within 0.1 and 3600 seconds")
    if options.count is not None and (options.count < 1 or not options.watch):
        raise UsageError("--count is a number of looks above 0, and goes with --watch")
    board, backend = open_board(options.url)
    with contextlib.closing(backend):
        if options.watch:
            _watch(board, options)
        else:
            board.look()
            print(_board_as_json(board) if options.json else "\n".join(table_of(board)))
    return 0 if board.answering else 1


def _watch(board: Board, options: argparse.Namespace) -> None:
    """Look again and again, until Ctrl-C or so often as was asked for."""
    from marble.watch import line_of, screen_of

    left = itertools.count() if options.count is None else range(options.count)
    pause = threading.Event()
    live = None
    if not options.json and sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.live import Live

        live = Live(screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), live or contextlib.nullcontext():
        for number in left:
            if number:
                pause.wait(options.interval)
            board.look()
            if live is not None:
                live.update(screen_of(board, live.console.width), refresh=True)
            else:
                print(_board_as_json(board) if options.json else line_of(board), flush=True)


def _board_as_json(board: Board) -> str:
    """All pictures, without the moments of the past."""
    nodes = [
        {"endpoint": seen.endpoint, "problem": seen.problem or None}
        | {name: value for name, value in seen.picture.items() if name != "moments"}
        | ({"moment": seen.moments[-1]} if seen.moments else {})
        for seen in board.nodes.values()
    ]
    return json.dumps({"looked_at": round(board.looked_at, 3), "nodes": nodes})


# -- doctor ------------------------------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from marble.doctor import Papers, examine
    from marble.transport.papers import CA, CERTIFICATE, KEY, TOKEN_FILE

    if not 0 < options.timeout <= 600:
        raise UsageError(f"--timeout {options.timeout:g}: it must be above 0 and at most 600 seconds")
    tls, endpoints = _split(options.nodes)
    # Where clients take them from, if they are not given (`marble.connect`).
    ca, certificate, key = options.ca, options.cert, options.key
    if tls is not False:
        ca, certificate, key = ca or _path_in(CA), certificate or _path_in(CERTIFICATE), key or _path_in(KEY)
    papers = Papers(ca, certificate, key, options.token_file or _path_in(TOKEN_FILE), options.server_name)
    report = examine(
        endpoints, papers, tls=tls, cluster_id=options.cluster_id, others=not options.only, timeout_s=options.timeout
    )
    if options.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _print_report(report)
    return 0 if report.healthy else 1


def _path_in(variable: str) -> Path | None:
    """The path that an environment variable names, if it is set."""
    value = os.environ.get(variable)
    return Path(value) if value else None


def _split(text: str) -> tuple[bool | None, list[str]]:
    """Whether TLS is asked for (None: not said), and the endpoints."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return None, [each.strip() for each in text.split(",")]
    known = _SCHEMES.get(scheme + separator)
    if known is None:
        raise UsageError(f"{text!r}: write host:port, grpc://host:port or grpc+tls://host:port")
    return known, [each.strip() for each in rest.rstrip("/").split(",")]


def _print_report(report: Report) -> None:
    width = min(_LINE_WIDTH_MAX, shutil.get_terminal_size().columns)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    where = None
    for finding in report.findings:
        if finding.where != where:
            where = finding.where
            print(where)
        _print_finding(finding, width, colour)
    print(_summary(report.findings))


def _print_finding(finding: Finding, width: int, colour: bool) -> None:
    level = finding.level.value
    sign = f"  {_SIGNS[level]:<{_SIGN_WIDTH}}"
    blank = " " * len(sign)
    lines = textwrap.wrap(finding.words, max(20, width - len(sign)))
    if finding.advice:
        arrow = textwrap.wrap(finding.advice, max(20, width - len(sign) - 2))
        lines += [("→ " if number == 0 else "  ") + line for number, line in enumerate(arrow)]
    shown = f"\x1b[{_COLOURS[level]}m{sign}\x1b[0m" if colour else sign
    for number, line in enumerate(lines):
        print((blank if number else shown) + line)


def _summary(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level.value == level for finding in findings) for level in ("problem", "warning")}
    said = [f"{count} {level}{'s' if count != 1 else ''}" for level, count in counts.items() if count]
    return "\n" + (", ".join(said) if said else "nothing is wrong")
