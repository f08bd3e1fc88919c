"""A cluster on a terminal: ``marble status`` once, ``marble status --watch`` again and again.

Rule 1: what is shown was said by a node (its action ``picture``, the same that its page shows); nothing is made up in between. What
was not said is a dash.
Rule 2: a node that does not answer delays nobody: all are asked at once, each with a deadline.

`Board` keeps what was said. `table_of` and `line_of` make plain text of it, `screen_of` what ``rich`` draws.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from marble.client import ClientOptions, RemoteBackend
from marble.config import parse_url
from marble.errors import MarbleError
from marble.sampling import HISTORY_S_MAX
from marble.transport.papers import credentials_for
from marble.transport.wire import encode_json

if TYPE_CHECKING:
    from rich.console import Group

NODES_MAX: Final = 64
"""More are not asked, whatever the nodes say of each other."""

ASK_TIMEOUT_S: Final = 2.0
SPAN_S: Final = 300.0
"""How much of the past a curve shows."""

LAG_WIDTH: Final = 12
"""Characters of a peer's own curve, one for each look."""

DASH: Final = "–"
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_PROBLEM_CHARACTERS_MAX: Final = 60


@dataclass(slots=True)
class Seen:
    """What is known of one node. `picture` is its last answer, ``{}`` if there was none; `problem` says why there is none now."""

    endpoint: str
    picture: Mapping[str, Any] = field(default_factory=dict)
    problem: str = "not asked yet"
    moments: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=HISTORY_S_MAX))
    lags: dict[int, deque[float]] = field(default_factory=dict)
    """If it leads: by how many entries each peer was behind at the last looks."""

    @property
    def answers(self) -> bool:
        return not self.problem

    @property
    def node(self) -> Mapping[str, Any]:
        found = self.picture.get("node")
        return found if isinstance(found, Mapping) else {}

    @property
    def leads(self) -> bool:
        return self.answers and self.node.get("role") == "leader"

    def take(self, picture: Mapping[str, Any]) -> None:
        """Take an answer in."""
        if _number(picture.get("uptime_s")) < _number(self.picture.get("uptime_s")):
            self.moments.clear()  # It was started anew, and counts its seconds from zero again.
        self.picture, self.problem = picture, ""
        columns = picture.get("moments")
        if isinstance(columns, Mapping) and isinstance(columns.get("at"), list):
            names = [name for name, column in columns.items() if isinstance(column, list)]
            rows = zip(*(columns[name] for name in names), strict=False)
            self.moments.extend(dict(zip(names, row, strict=True)) for row in rows)
        if not self.leads:
            self.lags.clear()
            return
        for peer in peers_of(picture):
            if not peer.get("here") and peer.get("lag") is not None:
                self.lags.setdefault(int(peer["node"]), deque(maxlen=LAG_WIDTH)).append(_number(peer["lag"]))


class Board:
    """All nodes of a cluster, looked at together. `look` belongs to one thread.

    Parameters
    ----------
    endpoints
        Some or all nodes; the others are learnt from them.
    ask
        Gives the answer of the node at an endpoint to ``picture`` with a body; raises a MarbleError.
    """

    def __init__(self, endpoints: Sequence[str], ask: Callable[[str, bytes], Mapping[str, Any]]) -> None:
        self.nodes = {endpoint: Seen(endpoint) for endpoint in endpoints}
        self.looked_at = 0.0
        """Wall clock of the last look."""
        self._ask = ask

    def look(self) -> None:
        """Ask all nodes; those that are named for the first time are asked, too."""
        asked: set[str] = set()
        while waiting := [seen for endpoint, seen in self.nodes.items() if endpoint not in asked]:
            with ThreadPoolExecutor(len(waiting), thread_name_prefix="marble-watch") as threads:
                list(threads.map(self._look_at, waiting))
            asked.update(seen.endpoint for seen in waiting)
            for seen in waiting:
                self._meet(seen)
        self.looked_at = time.time()

    def _look_at(self, seen: Seen) -> None:
        last = seen.moments[-1]["at"] if seen.moments else -1.0
        try:
            seen.take(self._ask(seen.endpoint, encode_json({"after": last})))
        except MarbleError as error:
            seen.problem = _short(str(error))

    def _meet(self, seen: Seen) -> None:
        own = {each.node.get("node_id") for each in self.nodes.values()}
        for peer in peers_of(seen.picture) if seen.answers else ():
            endpoint = str(peer.get("endpoint") or "")
            if endpoint and peer.get("node") not in own and len(self.nodes) < NODES_MAX:
                self.nodes.setdefault(endpoint, Seen(endpoint))

    @property
    def leader(self) -> Seen | None:
        """The node that leads in the newest term, as far as it answers."""
        leading = [seen for seen in self.nodes.values() if seen.leads]
        return max(leading, key=lambda seen: _number(seen.node.get("term")), default=None)

    @property
    def answering(self) -> list[Seen]:
        return [seen for seen in self.nodes.values() if seen.answers]

    def headline(self) -> str:
        """The cluster in one line."""
        up, leader = self.answering, self.leader
        if not up:
            return "no node answers: `marble doctor` says why"
        name = up[0].node.get("cluster_id", DASH)
        if leader is not None:
            leads = f"node {leader.node.get('node_id')} leads in term {leader.node.get('term')}"
        elif known := [seen.node["leader_id"] for seen in up if seen.node.get("leader_id")]:
            leads = f"node {known[0]} is said to lead, and does not answer"
        else:
            leads = "no leader"
        return f"cluster {name} · {leads} · {len(up)} of {len(self.nodes)} nodes answer"


def peers_of(picture: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a node says of all nodes, itself included."""
    found = picture.get("peers")
    return [peer for peer in found if isinstance(peer, Mapping)] if isinstance(found, list) else []


def ask_through(backend: RemoteBackend) -> Callable[[str, bytes], Mapping[str, Any]]:
    """How a `Board` asks the nodes of a cluster."""
    return lambda endpoint, body: backend.ask_one(endpoint, "picture", body)


def open_board(url: str) -> tuple[Board, RemoteBackend]:
    """A board of the nodes at `url`, and the connections to be closed after it."""
    endpoints = parse_url(url)
    backend = RemoteBackend(endpoints, ClientOptions(ASK_TIMEOUT_S, credentials_for(url)))
    return Board(endpoints, ask_through(backend)), backend


# -- words ---------------------------------------------------------------------------------------------------------------

HEADER: Final = (
    "node",
    "endpoint",
    "role",
    "term",
    "applied",
    "behind",
    "entries/s",
    "sync p99",
    "log",
    "memory",
    "health",
)
NUMBERS: Final = frozenset({"term", "applied", "behind", "entries/s", "sync p99", "log", "memory"})

LAGS: Final = "lags"
SCREEN: Final = (*HEADER[: HEADER.index("behind") + 1], LAGS, *HEADER[HEADER.index("behind") + 1 :])
"""What a screen has beside: how far behind a peer was at the last looks, as a curve."""

SPARE: Final = ("memory", "log", "term", LAGS, "sync p99", "entries/s")
"""What a narrow screen does without, in this order."""


def row_of(board: Board, seen: Seen) -> dict[str, str]:
    """One node as words, by the names of `HEADER`; of one that does not answer only ``endpoint`` and ``health``."""
    if not seen.answers:
        return {"node": _known(seen.node.get("node_id")), "endpoint": seen.endpoint, "health": seen.problem}
    node, last = seen.node, seen.moments[-1] if seen.moments else {}
    return {
        "node": _known(node.get("node_id")),
        "endpoint": seen.endpoint,
        "role": _known(node.get("role")),
        "term": _known(node.get("term")),
        "applied": _count(node.get("applied_index")),
        "behind": _count(_lag(board, seen)),
        "entries/s": _count(last.get("entries")),
        "sync p99": milliseconds(last.get("sync_p99")),
        "log": size(node.get("log_bytes")),
        "memory": size(node.get("memory_bytes")),
        "health": _health(seen),
    }


def _lag(board: Board, seen: Seen) -> object:
    """By how many entries the leader finds this node behind."""
    leader = board.leader
    if leader is None or leader is seen:
        return None
    for peer in peers_of(leader.picture):
        if peer.get("node") == seen.node.get("node_id"):
            return peer.get("lag")
    return None


def _health(seen: Seen) -> str:
    health = seen.picture.get("health")
    components = health.get("components") if isinstance(health, Mapping) else None
    if not isinstance(components, Mapping):
        return DASH
    ill = [
        str(name)
        for name, component in components.items()
        if isinstance(component, Mapping) and component.get("healthy") is False and name != "transport"
    ]
    return "well" if not ill else "not well: " + ", ".join(ill)


def table_of(board: Board) -> list[str]:
    """The board as lines of plain text: the headline, then a row for each node."""
    rows = [{name: name for name in HEADER}, *(row_of(board, seen) for seen in board.nodes.values())]
    # What a node says instead of an answer is as long as it likes, and stands at the end of the line.
    widths = {name: max(len(row.get(name, DASH)) for row in rows) for name in HEADER[:-1]}
    lines = []
    for row in rows:
        cells = [_aligned(row.get(name, DASH), name, width) for name, width in widths.items()]
        lines.append("  ".join([*cells, row["health"]]).rstrip())
    return [board.headline(), "", *lines]


def _aligned(text: str, name: str, width: int) -> str:
    return text.rjust(width) if name in NUMBERS else text.ljust(width)


def line_of(board: Board) -> str:
    """The board in one line, for a pipe or a log."""
    moment = time.strftime("%H:%M:%S", time.localtime(board.looked_at))
    leader = board.leader
    parts = [moment, board.headline()]
    if leader is not None and leader.moments:
        last = leader.moments[-1]
        parts.append(f"{_count(last.get('entries'))} entries/s")
        for name in ("commit", "sync"):
            both = f"{milliseconds(last.get(f'{name}_p50'))} / {milliseconds(last.get(f'{name}_p99'))}"
            parts.append(f"{name} p50/p99 {both}")
        behind = [f"node {node} {_count(lags[-1])}" for node, lags in sorted(leader.lags.items())]
        if behind:
            parts.append("behind: " + ", ".join(behind))
    away = [seen.endpoint for seen in board.nodes.values() if not seen.answers]
    if away:
        parts.append("silent: " + ", ".join(away))
    return " · ".join(parts)


# -- curves --------------------------------------------------------------------------------------------------------------

CURVES: Final = (
    ("entries/s", "entries", "rate"),
    ("writes/s", "writes", "rate"),
    ("commit p50", "commit_p50", "time"),
    ("commit p99", "commit_p99", "time"),
    ("sync p99", "sync_p99", "time"),
    ("apply p99", "apply_p99", "time"),
    ("slowest peer", "peer_lag", "rate"),
)
"""Name, field of a moment, and what it is: of the leader."""


def stretch_s(seen: Seen, width: int) -> float:
    """How many seconds one character of a curve of `width` stands for: so many that `SPAN_S`, or all that is known, fits."""
    known = SPAN_S if not seen.moments else _number(seen.picture.get("uptime_s")) - _number(seen.moments[0].get("at"))
    return max(1.0, math.ceil(min(SPAN_S, known) / width))


def curve(seen: Seen, name: str, width: int) -> list[float | None]:
    """`width` values up to now, the greatest of each stretch of `stretch_s` seconds; None where nothing is known."""
    now, step = _number(seen.picture.get("uptime_s")), stretch_s(seen, width)
    slots: list[float | None] = [None] * width
    for moment in seen.moments:
        slot = width - 1 - int((now - _number(moment.get("at"))) / step)
        if 0 <= slot < width:
            slots[slot] = max(slots[slot] or 0.0, _number(moment.get(name)))
    # A node looks at itself once a second, more or less: a stretch that was missed by a hair is no gap.
    for slot in range(1, width):
        later = slots[slot + 1] if slot + 1 < width else 0.0
        if slots[slot] is None and slots[slot - 1] is not None and later is not None:
            slots[slot] = slots[slot - 1]
    return slots


def sparkline(values: Sequence[float | None], top: float | None = None) -> str:
    """`values` as blocks, one character each, from 0 to `top` (default: the greatest of them); blank where there is none."""
    greatest = max((value for value in values if value is not None), default=0.0) if top is None else top
    text = ""
    for value in values:
        if value is None:
            text += " "
        else:
            share = value / greatest if greatest > 0 else 0.0
            text += _BLOCKS[min(len(_BLOCKS) - 1, math.ceil(share * (len(_BLOCKS) - 1)))]
    return text


def screen_of(board: Board, width: int) -> Group:
    """The board for ``rich``, at most `width` characters wide."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    clock = time.strftime("%H:%M:%S", time.localtime(board.looked_at))
    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right", style="dim", no_wrap=True)
    style = "bold red" if board.leader is None else "bold"
    head.add_row(Text(f"marble  {board.headline()}", style=style, overflow="ellipsis"), clock)

    rows = [row_of(board, seen) for seen in board.nodes.values()]
    names = _fitting(rows, width)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in names:
        style = "cyan" if name == LAGS else ""
        table.add_column("" if name == LAGS else name, justify="right" if name in NUMBERS else "left", style=style)
    for seen, row in zip(board.nodes.values(), rows, strict=True):
        table.add_row(*(_cell(board, seen, row, name) for name in names))
    leader = board.leader
    parts: list[Any] = [head, Text(""), table]
    if leader is not None:
        parts += [Text(""), _curves(leader, width)]
    return Group(*parts)


def _fitting(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The columns that fit into `width` characters: the least important ones are left out."""
    names = list(SCREEN)
    taken = {name: max([len(name), *(len(row.get(name, DASH)) for row in rows)]) for name in names}
    taken |= {LAGS: LAG_WIDTH, "health": 10}
    for name in SPARE:
        if sum(taken[each] + 2 for each in names) > width:
            names.remove(name)
    return names


def _cell(board: Board, seen: Seen, row: Mapping[str, str], name: str) -> Any:
    from rich.text import Text

    if name == LAGS:
        leader, node = board.leader, seen.node.get("node_id")
        lags = list(leader.lags.get(node, ())) if leader is not None and isinstance(node, int) else []
        return Text(sparkline(lags, max(1.0, *lags)) if len(lags) > 1 else "")
    text = row.get(name, DASH)
    if name == "health":
        return Text(text, style="red" if not seen.answers else "green" if text in ("well", DASH) else "yellow")
    style = "dim" if text == DASH else "red" if not seen.answers else "bold" if seen.leads else ""
    return Text(text, style=style, no_wrap=True)


def _curves(leader: Seen, width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    columns = max(10, min(100, width - 40))
    span_s = stretch_s(leader, columns) * columns
    table.add_column(f"at node {leader.node.get('node_id')}", no_wrap=True)
    table.add_column(f"the last {f'{span_s / 60:.0f} minutes' if span_s >= 120 else f'{span_s:.0f} s'}", style="cyan")
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True, style="dim")
    for title, name, kind in CURVES:
        values = curve(leader, name, columns)
        shown = milliseconds if kind == "time" else _count
        now = leader.moments[-1].get(name) if leader.moments else None
        peak = max((value for value in values if value is not None), default=None)
        table.add_row(title, Text(sparkline(values)), shown(now), shown(peak))
    return table


# -- numbers -------------------------------------------------------------------------------------------------------------


def size(nbytes: object) -> str:
    """Bytes for people: ``12.3 MiB``."""
    if not _is_number(nbytes):
        return DASH
    value, unit = _number(nbytes), 0
    while value >= 1024 and unit < 4:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {('', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def milliseconds(seconds: object) -> str:
    """A duration for people, in milliseconds; a dash for none: nothing was measured."""
    if not _is_number(seconds) or not _number(seconds):
        return DASH
    value = _number(seconds) * 1000
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _count(value: object) -> str:
    return f"{_number(value):,.0f}" if _is_number(value) else DASH


def _known(value: object) -> str:
    return DASH if value is None else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _short(text: str) -> str:
    line = text.split(". gRPC client debug context", 1)[0].replace("\n", " ")
    return line if len(line) <= _PROBLEM_CHARACTERS_MAX else line[: _PROBLEM_CHARACTERS_MAX - 1] + "…"
