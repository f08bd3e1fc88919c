"""What DoAction can do at a node: catalog, sessions, members, leadership, snapshots, status.

Rule 1: everything in a body is untrusted and checked here, before the node sees it.
Rule 2: what changes the replicated state is done by the leader. Another node relays it, one hop, unless the call has the header
``marble-forward: never``. What concerns one node (``snapshot``, ``campaign``, ``forget_leader``, ``status``,
``health``, ``metrics``, ``picture``) is done by the node asked.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol, TypeVar

import pyarrow as pa
import pyarrow.flight as flight

from marble.config import addresses_of, canonical_endpoint
from marble.errors import MarbleError, NotLeaderError, OutcomeUnknownError, UnavailableError, UsageError
from marble.local import LocalBackend
from marble.lsm import payload
from marble.promises import Committed
from marble.transport import wire
from marble.transport.admission import authority, demand, may
from marble.transport.relay import Relays
from marble.transport.tokens import ANYWHERE, Access
from marble.types import NODE_ID_MAX, Change, ChangeKind, EntryKind, Members, Role, Transition
from marble.web.health import as_json
from marble.web.watch import Watch

E = TypeVar("E", bound=enum.Enum)
T = TypeVar("T")

MEMBERS_BYTES_MAX: Final = 64 * 1024
"""The body of a change of the members."""

CHANGES_MAX: Final = 64
"""Changes in one step."""

SNAPSHOT_TIMEOUT_S: Final = 600.0
"""Writing a large state at a measured pace takes its time. The snapshot goes on when the wait for it has ended."""

BACKUP_PIECE_BYTES_MAX: Final = 4 * 1024 * 1024
"""What one answer carries of a backup."""

ACTIONS: Final = {
    "begin_backup": 'Make a copy of this node\'s files, by links; answers {"token", "files": {path: bytes}}. Fetch it soon.',
    "campaign": "Let this node stand for election now. No body.",
    "change_membership": 'Body {"changes": [{"kind": "add-voter", "add-learner" or "remove", "node", "endpoint"}], '
    '"transition": "auto", "joint" or "explicit"}, no changes to leave a joint group; answers {"index", "term"}.',
    "close_session": 'Body {"session"}: its answers are forgotten, and what it still sends is refused.',
    "create_table": 'Body {"name", "key": [..], "schema": base64 of Schema.serialize(), "options": {..} if any}; answers the table.',
    "drop_table": 'Body {"name"}; answers {"index"}.',
    "end_backup": 'Body {"token"}: the copy is not needed any more.',
    "forget_leader": "Let this follower stop to wait for its leader, so that it grants votes at once. No body.",
    "health": 'How each component of this node is: {"live", "ready", "healthy", "components": {name: {"healthy", "detail"}}}. No body.',
    "members": 'Who takes part. Body empty or {"consistency": "linearizable" or "local"}.',
    "metrics": "This node's metrics in Prometheus' text format, and no JSON. No body.",
    "open_session": 'Begin a session, for the stamps of what is to take effect once. No body; answers {"session"}.',
    "picture": 'What the page of this node shows: node, peers, health, and the moments of the last minutes. Body empty or {"after"}: '
    "those later than so many seconds after its start.",
    "ping": "Answers {}.",
    "propose": 'Body: any bytes, replicated as one operation; answers {"index", "term"}.',
    "read_backup": 'Body {"token", "path", "offset", "bytes"}; answers these bytes of the copy, at most 4 MiB, and no JSON.',
    "snapshot": 'Write a snapshot of this node\'s state now, and forget the log behind it; answers {"index"}.',
    "status": "This node's picture of itself and its cluster.",
    "tables": 'All tables. Body empty or {"consistency": "linearizable" or "local"}.',
    "transaction": 'Body: the payload of a TRANSACTION (docs/tables.md), done as a whole; answers {"index", "term", "value"}.',
    "transfer_leadership": 'Body {"to"}: let that voter lead; answers {} when it does.',
}
"""Name and description of each action. All answers are JSON, if nothing else is said."""


RIGHTS: Final[dict[str, tuple[Access, str | None]]] = {
    **dict.fromkeys(("health", "members", "metrics", "picture", "ping", "status", "tables"), (Access.READ, ANYWHERE)),
    **dict.fromkeys(("open_session", "close_session", "transaction"), (Access.WRITE, ANYWHERE)),
    "propose": (Access.WRITE, None),
    **dict.fromkeys(("create_table", "drop_table"), (Access.ADMIN, ANYWHERE)),
}
"""What an action needs, and for which tables (None: all). What is not named here needs ADMIN on all tables. What names tables in its
body is looked at again when that is read."""


class Waiter(Protocol):
    """Waits for a future of the engine; see `marble.service.TablesService`."""

    def __call__(self, future: Future[T], timeout_s: float, late: type[MarbleError]) -> T: ...


class Actions:
    """The actions of one node. Thread-safe.

    Parameters
    ----------
    backend
        The node and its tables.
    relays
        The way to the leader.
    wait
        Gives the result of a future; raises an error of the class it is given if there is none in time.
    confirm
        Waits until what was committed anywhere when it was called is applied here.
    watch
        Knows how the node is.
    """

    def __init__(
        self, backend: LocalBackend, relays: Relays, wait: Waiter, confirm: Callable[[], None], watch: Watch
    ) -> None:
        self._backend = backend
        self._node = backend.node
        self._machine = backend.machine
        self._relays = relays
        self._wait = wait
        self._confirm = confirm
        self._watch = watch
        self._timeout_s = backend.node.options.propose_timeout_s
        self._actions: dict[str, Callable[[Any, bytes | pa.Buffer], bytes]] = {
            "begin_backup": self._begin_backup,
            "campaign": self._campaign,
            "change_membership": self._change_membership,
            "close_session": self._close_session,
            "create_table": self._create_table,
            "drop_table": self._drop_table,
            "end_backup": self._end_backup,
            "forget_leader": self._forget_leader,
            "health": lambda context, body: wire.encode_json(as_json(watch.health())),
            "members": self._members,
            "metrics": lambda context, body: watch.metrics_text().encode(),
            "open_session": self._open_session,
            "picture": self._picture,
            "ping": lambda context, body: b"{}",
            "propose": self._propose,
            "read_backup": self._read_backup,
            "snapshot": self._snapshot,
            "status": lambda context, body: wire.encode_json(self._node.status()),
            "tables": self._tables,
            "transaction": self._transaction,
            "transfer_leadership": self._transfer_leadership,
        }

    def do(self, context: Any, action: flight.Action) -> bytes:
        """Do one of `ACTIONS`; its answer. Raises UsageError for any other."""
        handler = self._actions.get(action.type)
        if handler is None:
            known = ", ".join(repr(name) for name in sorted(self._actions))
            raise UsageError(f"there is no action {action.type[:80]!r}: there is {known}")
        demand(context, *RIGHTS.get(action.type, (Access.ADMIN, None)))
        return handler(context, action.body or b"")

    # -- tables and sessions ---------------------------------------------------------------------------------------------

    def _create_table(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        asked = wire.decode_object(body, "create_table", wire.TABLE_BYTES_MAX, ("name", "key", "schema"), ("options",))
        schema = wire.decode_schema(asked["schema"])
        options = wire.options_from_json(asked.get("options", {}), schema)
        encoded = payload.encode_create_table(asked["name"], schema, asked["key"], options)
        demand(context, Access.ADMIN, asked["name"])

        stamp = _stamp(context)

        def create() -> bytes:
            committed = self._commit(EntryKind.CREATE_TABLE, encoded, stamp)
            return wire.encode_table_info(self._machine.table(committed.value))

        return self._at_leader(context, "create_table", body, create, repeatable=stamp is None)

    def _drop_table(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        asked = wire.decode_object(body, "drop_table", wire.TICKET_BYTES_MAX, ("name",))
        encoded = payload.encode_drop_table(asked["name"])
        demand(context, Access.ADMIN, asked["name"])

        stamp = _stamp(context)

        def drop() -> bytes:
            return wire.encode_json({"index": self._commit(EntryKind.DROP_TABLE, encoded, stamp).index})

        return self._at_leader(context, "drop_table", body, drop, repeatable=False)

    def _propose(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        limit = self._node.options.entry_bytes_max
        if len(body) > limit:
            raise UsageError(f"the operation has {len(body)} bytes, more than max_entry_size ({limit})")

        stamp = _stamp(context)

        def propose() -> bytes:
            committed = self._commit(EntryKind.COMMAND, payload.encode_command(bytes(body)), stamp)
            return wire.encode_json({"index": committed.index, "term": committed.term})

        return self._at_leader(context, "propose", body, propose, repeatable=False)

    def _transaction(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        limit = self._node.options.entry_bytes_max
        if len(body) > limit:
            raise UsageError(f"the transaction has {len(body):,} bytes, more than max_entry_size ({limit:,}): split it")
        stamp = _stamp(context)
        if not may(context, Access.WRITE, None):
            # Some tables only: a node that relays it looks at them too, whoever it then calls as.
            self._checked_transaction(context, body)

        def transact() -> bytes:
            committed = self._commit(EntryKind.TRANSACTION, self._checked_transaction(context, body), stamp)
            return wire.encode_json({"index": committed.index, "term": committed.term, "value": committed.value})

        return self._at_leader(context, "transaction", body, transact, repeatable=False)

    def _checked_transaction(self, context: Any, body: bytes | pa.Buffer) -> pa.Buffer:
        """`body` as a payload, whose operations fit the tables that there are."""
        data = pa.allocate_buffer(len(body))
        memoryview(data).cast("B")[:] = memoryview(body).cast("B")
        operations = payload.decode_transaction(data)
        confirmed = False
        for operation in operations:
            try:
                info = self._machine.table(operation.table)
            except UsageError:
                # It may have been created elsewhere a moment ago.
                if not confirmed:
                    self._confirm()
                confirmed, info = True, self._machine.table(operation.table)
            demand(context, Access.WRITE, info.name)
            payload.check_operation(operation, info)
        return data

    def _open_session(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        def open_session() -> bytes:
            return wire.encode_json({"session": self._commit(EntryKind.OPEN_SESSION, None).value})

        # A session that was opened and whose number was lost costs a little memory until it expires.
        return self._at_leader(context, "open_session", body, open_session, repeatable=True)

    def _close_session(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        asked = wire.decode_object(body, "close_session", wire.STAMP_BYTES_MAX, ("session",))
        session = wire.check_number(asked["session"], "session")

        def close_session() -> bytes:
            future = self._backend.propose(EntryKind.CLOSE_SESSION, 0, None, stamp=wire.Stamp(session, 0))
            return wire.encode_json({"index": self._wait(future, self._timeout_s, OutcomeUnknownError).index})

        return self._at_leader(context, "close_session", body, close_session, repeatable=True)

    def _tables(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        if _consistency(body, "tables") == "linearizable":
            self._confirm()
        return wire.encode_tables([info for info in self._machine.tables() if may(context, Access.READ, info.name)])

    # -- members and leadership --------------------------------------------------------------------------------------------

    def _members(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        if _consistency(body, "members") == "linearizable":
            self._confirm()
        return wire.encode_json(members_to_json(self._node.members(), self._node.endpoints))

    def _change_membership(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        changes, endpoints, transition = decode_changes(body)

        def change() -> bytes:
            check_endpoints(changes, endpoints, self._node.endpoints)
            future = self._node.change_membership(changes, endpoints, transition)
            committed: Committed = self._wait(future, self._timeout_s, OutcomeUnknownError)
            return wire.encode_json({"index": committed.index, "term": committed.term})

        return self._at_leader(context, "change_membership", body, change, repeatable=False)

    def _transfer_leadership(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        asked = wire.decode_object(body, "transfer_leadership", wire.STAMP_BYTES_MAX, ("to",))
        to = check_node(asked["to"], "to")

        def transfer() -> bytes:
            self._wait(self._node.transfer_leadership(to), self._timeout_s, UnavailableError)
            return b"{}"

        # A repeat asks the one who leads then; if that is the one that was wanted, there is nothing to do.
        return self._at_leader(context, "transfer_leadership", body, transfer, repeatable=True)

    def _campaign(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        self._node.campaign()
        return b"{}"

    def _forget_leader(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        self._wait(self._node.forget_leader(), self._node.options.read_timeout_s, UnavailableError)
        return b"{}"

    def _snapshot(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        index = self._wait(self._node.snapshot(), SNAPSHOT_TIMEOUT_S, UnavailableError)
        return wire.encode_json({"index": index})

    def _picture(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        asked = wire.decode_object(body, "picture", wire.TICKET_BYTES_MAX, (), ("after",)) if len(body) else {}
        after = asked.get("after", -1.0)
        if isinstance(after, bool) or not isinstance(after, int | float):
            raise UsageError("picture takes after, a number of seconds")
        return wire.encode_json(self._watch.picture(after))

    # -- backups -----------------------------------------------------------------------------------------------------------

    def _begin_backup(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        # What was acknowledged anywhere is to be in it.
        self._confirm()
        token, files = self._node.checkpoints.make()
        return wire.encode_json({"token": token, "files": files})

    def _read_backup(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        names = ("token", "path", "offset", "bytes")
        asked = wire.decode_object(body, "read_backup", wire.TICKET_BYTES_MAX, names)
        token, path, offset, wanted = (asked[name] for name in names)
        if not isinstance(token, str) or not isinstance(path, str) or type(offset) is not int:
            raise UsageError("read_backup takes a token, a path, an offset and a number of bytes")
        nbytes = min(wire.check_number(wanted, "bytes"), BACKUP_PIECE_BYTES_MAX)
        return self._node.checkpoints.read(token, path, offset, nbytes)

    def _end_backup(self, context: Any, body: bytes | pa.Buffer) -> bytes:
        token = wire.decode_object(body, "end_backup", wire.STAMP_BYTES_MAX, ("token",))["token"]
        self._node.checkpoints.drop(str(token))
        return b"{}"

    # -- where and how -----------------------------------------------------------------------------------------------------

    def not_leader(self) -> NotLeaderError:
        """What a node says that does not lead."""
        return NotLeaderError(
            f"node {self._node.options.node_id} does not lead, and nothing was written", self._node.leader_endpoint
        )

    def _commit(self, kind: EntryKind, body: pa.Buffer | None, stamp: wire.Stamp | None = None) -> Committed:
        future: Future[Committed] = self._backend.propose(kind, 0, body, stamp=stamp)
        return self._wait(future, self._timeout_s, OutcomeUnknownError)

    def _at_leader(
        self, context: Any, name: str, body: bytes | pa.Buffer, do: Callable[[], bytes], *, repeatable: bool
    ) -> bytes:
        """The answer of `do`, or of the leader to the same action if this node does not lead."""
        try:
            if self._node.role is not Role.LEADER:
                raise self.not_leader()
            return do()
        except NotLeaderError:
            if not may_forward(context):
                raise
        return self._relays.action(
            name, bytes(body), repeatable=repeatable, stamp=_stamp(context), authority=authority(context)
        )


def may_forward(context: Any) -> bool:
    """Whether a call may be relayed to the leader."""
    headers = context.get_middleware(wire.CallHeaders.KEY)
    return headers is None or bool(headers.forward)


def _stamp(context: Any) -> wire.Stamp | None:
    headers: wire.CallHeaders | None = context.get_middleware(wire.CallHeaders.KEY)
    return None if headers is None else headers.stamp()


def _consistency(body: bytes | pa.Buffer, name: str) -> str:
    if not len(body):
        return "linearizable"
    asked = wire.decode_object(body, name, wire.TICKET_BYTES_MAX, (), ("consistency",))
    return wire.check_consistency(asked.get("consistency", "linearizable"))


def members_to_json(members: Members, endpoints: Mapping[int, str]) -> dict[str, Any]:
    """`members` as an object of JSON, with where each of them is found."""
    return {
        "voters": list(members.voters),
        "outgoing": list(members.outgoing),
        "learners": list(members.learners),
        "learners_next": list(members.learners_next),
        "auto_leave": members.auto_leave,
        "endpoints": {str(node): endpoints[node] for node in members.all if node in endpoints},
    }


def decode_changes(body: bytes | pa.Buffer) -> tuple[list[Change], dict[int, str], Transition]:
    """The body of "change_membership": the changes, where new nodes are found, and how the change takes effect.

    Raises
    ------
    UsageError
        If it is not that. Whether the changes make sense is for the leader to see.
    """
    what = "change_membership"
    asked = wire.decode_object(body, what, MEMBERS_BYTES_MAX, ("changes",), ("transition",))
    transition = _one_of(Transition, asked.get("transition", Transition.AUTO.value), "transition")
    given = asked["changes"]
    if not isinstance(given, list) or len(given) > CHANGES_MAX:
        raise UsageError(f"changes must be a list of at most {CHANGES_MAX}")
    changes: list[Change] = []
    endpoints: dict[int, str] = {}
    for each in given:
        change = wire.check_object(each, "a change", ("kind", "node"), ("endpoint",))
        node = check_node(change["node"], "node of a change")
        changes.append(Change(_one_of(ChangeKind, change["kind"], "kind of a change"), node))
        if change.get("endpoint") is not None:
            endpoints[node] = canonical_endpoint(change["endpoint"], what=f"endpoint of node {node}")
    return changes, endpoints, transition


def check_endpoints(changes: Sequence[Change], endpoints: Mapping[int, str], known: Mapping[int, str]) -> None:
    """Raise UsageError unless each node that is added is found at one place, and each place is of one node."""
    removed = {change.node for change in changes if change.kind is ChangeKind.REMOVE}
    for change in changes:
        if change.kind is not ChangeKind.REMOVE and change.node not in known and change.node not in endpoints:
            raise UsageError(f"node {change.node} is new: say where it is found")
    for node, endpoint in endpoints.items():
        for other, place in known.items():
            shared = set(addresses_of(place)).intersection(addresses_of(endpoint))
            if other != node and shared and other not in removed:
                raise UsageError(f"node {node} cannot be at {min(shared)}: node {other} is there")


def check_node(value: object, what: str) -> int:
    """Return `value` if it can be the id of a node, else raise UsageError."""
    node = wire.check_number(value, what)
    if node > NODE_ID_MAX:
        raise UsageError(f"{what} is {node}: a node's id is at most {NODE_ID_MAX}")
    return node


def _one_of(kind: type[E], value: object, what: str) -> E:
    for each in kind:
        if each.value == value:
            return each
    known = ", ".join(repr(each.value) for each in kind)
    raise UsageError(f"{what} must be one of {known}, not {str(value)[:80]!r}")
