"""Runs transcripts: text files of commands to a few cores, and what they said.

A transcript is blocks of comment lines (``#``), command lines, a line ``----``, and the output up to the next empty
line::

    # The leader's no-op commits.
    campaign 1
    stabilize
    ----
    1->2 REQUEST_PRE_VOTE term=1 last=0/0
    ...

Everything is by hand: no message moves, no write becomes durable and no time passes unless a command says so. Chance is
not random: node ``n`` has an election timeout of ``election_ticks + n - 1`` and its contexts of reads start at ``100 *
n``. The harness is the driver, too: it makes the entries that change the membership and applies them; a snapshot that
is offered is there as soon as the offer is delivered.

Commands (``ID`` is a node; ``from= to= kind= skip= n=`` choose messages of the network; MEMBERS is ``voters=1,2
outgoing=1,2,3 learners=4 learners_next=3 auto_leave``, what is empty left out)::

    add-nodes N [MEMBERS] [KEY=VALUE or KEY@ID=VALUE of RaftConfig ...] [logID=TERMS] [hardID=TERM/VOTE/COMMIT]
                [snapID=INDEX/TERM]   its newest snapshot, of MEMBERS; its log starts after it
    add-node ID                       with an empty disk, and without members: it waits to be added
    define INDEX/TERM MEMBERS         what an entry of the given logs, or of a message made by hand, changes
    campaign ID [force]          propose ID SIZE,...      read ID REQUEST [lease]    tick ID [n=1]
    propose-membership ID +4 +l5 -1 ... [joint | explicit]    leave ID               transfer ID TARGET
    forget-leader ID             wake ID                  clock ID US
    rounds ID [ID ...] [n=1]     n times: tick the first, stabilize these nodes, or all
    ready ID                     take one Ready; send what may go at once, start the write, apply
    persist ID [n=1]             the first n writes under way are durable: report the last, then send what waited
    apply ID [n=1]               the first n spans that wait are applied
    hold ID disk | apply         from now on its writes, or what is to be applied, wait for `persist` or `apply`
    go ID disk | apply           no longer
    process [ID ...]             ready and persist until there is nothing to do
    snapshot ID                  of what is applied       purge ID INDEX
    snapshot-failed ID PEER      snapshot-arrived ID PEER
    deliver | drop | double [from=ID] [to=ID] [kind=KIND] [skip=COUNT] [n=COUNT]
    stabilize [ID ...]           process and deliver among these nodes until nothing moves
    step FROM TO KIND [FIELD=VALUE ...] [terms=T,...] [changes=INDEX,...]     a message made by hand
    crash ID                     lose all but what is durable    restart ID
    unreachable ID PEER          log [ID]    status [ID]    members [ID]    progress ID    messages
    quietly COMMAND              without its output
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from raft.wording import read_change, read_members, read_option, show, show_members, show_span

from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import MarbleError
from marble.raft.core import MemoryStorage, Raft, RaftConfig
from marble.raft.messages import Message, MessageKind, Ready, Span
from marble.types import HardState, Members, Role, SnapshotMeta, Transition

CLOCK_START_US = 1_000_000
"""Every node's monotonic clock shows this when the transcript starts; each tick adds ``tick_us``."""


class ScriptedRandom:
    """Chance that a transcript can foresee."""

    def __init__(self, node: int) -> None:
        self._node = node

    def randrange(self, start: int, stop: int) -> int:
        if stop > 1 << 32:
            return 100 * self._node
        return min(start + self._node - 1, stop - 1)


@dataclass
class Disk:
    """What a node would find after a crash, and the writes on their way there."""

    # Who takes part before any entry is applied.
    genesis: Members
    hard_state: HardState = field(default_factory=HardState)
    # The log goes on after this entry.
    start: tuple[int, int] = (0, 0)
    terms: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    snapshot: SnapshotMeta | None = None
    writes: deque[tuple[Ready, list[int], list[int]]] = field(default_factory=deque)

    def start_after(self, index: int, term: int) -> None:
        """What leads up to an entry is in a snapshot; the rest stays if it follows that entry."""
        first = self.start[0] + 1
        matches = index < first or (index < first + len(self.terms) and self.terms[index - first] == term)
        gone = index + 1 - first if matches else len(self.terms)
        del self.terms[:gone], self.sizes[:gone]
        self.start = (index, term)

    def write(self, ready: Ready, terms: list[int], sizes: list[int]) -> None:
        """All that a Ready wanted to be durable is."""
        if ready.hard_state is not None:
            self.hard_state = ready.hard_state
        if ready.snapshot is not None:
            self.snapshot = ready.snapshot
            self.start_after(ready.snapshot.index, ready.snapshot.term)
        if ready.append is not None:
            at = ready.append.first - self.start[0] - 1
            self.terms[at:] = terms
            self.sizes[at:] = sizes


class Harness:
    """The nodes of one transcript and the network between them."""

    def __init__(self) -> None:
        self.nodes: dict[int, Raft] = {}
        self.disks: dict[int, Disk] = {}
        self.clocks: dict[int, int] = {}
        self.network: list[Message] = []
        self.output: list[str] = []
        self.options: dict[str, str] = {}
        # What the entries that change the membership say: the payloads of the driver.
        self.changes: dict[tuple[int, int], Members] = {}
        # What a node has to apply: spans with the terms of their entries, and snapshots to restore.
        self.to_apply: dict[int, deque[tuple[Span, list[int]] | SnapshotMeta]] = {}
        self.held: set[tuple[int, str]] = set()
        self.commands: dict[str, Callable[[list[str], dict[str, str]], object]] = {
            "add-nodes": self.add_nodes,
            "add-node": lambda args, _: self.add_node(int(args[0]), Members()),
            "define": self.define,
            "campaign": lambda args, _: self._raft(args).campaign(force="force" in args),
            "propose": self.propose,
            "propose-membership": self.propose_membership,
            "leave": lambda args, _: self._proposed(self._raft(args).propose_membership([])),
            "transfer": lambda args, _: self._raft(args).transfer_leadership(int(args[1])),
            "forget-leader": lambda args, _: self._raft(args).forget_leader(),
            "wake": lambda args, _: self._raft(args).wake(),
            "read": self.read,
            "tick": lambda args, options: self.tick(int(args[0]), int(options.get("n", "1"))),
            "rounds": self.rounds,
            "clock": lambda args, _: self.clocks.update({int(args[0]): int(args[1])}),
            "ready": lambda args, _: self.ready(int(args[0])),
            "persist": lambda args, options: self.persist(int(args[0]), int(options.get("n", "1"))),
            "apply": lambda args, options: self.apply(int(args[0]), int(options.get("n", "1"))),
            "hold": lambda args, _: self.held.add((int(args[0]), args[1])),
            "go": lambda args, _: self.held.remove((int(args[0]), args[1])),
            "process": lambda args, _: self.process(self._ids(args)),
            "snapshot": lambda args, _: self.snapshot(int(args[0])),
            "purge": lambda args, _: self.purge(int(args[0]), int(args[1])),
            "snapshot-failed": lambda args, _: self._raft(args).report_snapshot(int(args[1]), ok=False),
            "snapshot-arrived": lambda args, _: self._raft(args).report_snapshot(int(args[1]), ok=True),
            "deliver": lambda _, options: self.deliver(options),
            "drop": lambda _, options: self.drop(options),
            "double": self.double,
            "stabilize": lambda args, _: self.stabilize(self._ids(args)),
            "step": self.step,
            "crash": self.crash,
            "restart": lambda args, _: self.restart(int(args[0])),
            "unreachable": lambda args, _: self._raft(args).report_unreachable(int(args[1])),
            "way-lost": lambda args, _: self._raft(args).report_way_lost(int(args[1])),
            "log": lambda args, _: self.show_log(self._ids(args)),
            "status": lambda args, _: self.show_status(self._ids(args)),
            "members": lambda args, _: [self._say_members(node) for node in self._ids(args)],
            "progress": self.show_progress,
            "messages": lambda _, __: self.output.extend(show(message) for message in self.network),
        }

    def run(self, line: str) -> None:
        """One command line. An error of marble is output, any other is the transcript's fault."""
        name, *words = line.split()
        if name == "quietly":
            output, self.output = self.output, []
            self.run(line.removeprefix("quietly").strip())
            self.output = output
            return
        options = dict(word.split("=", 1) for word in words if "=" in word)
        try:
            self.commands[name]([word for word in words if "=" not in word], options)
        except MarbleError as error:
            self.output.append(f"{type(error).__name__}: {error}")

    def _ids(self, args: list[str]) -> list[int]:
        return [int(arg) for arg in args] if args else sorted(self.nodes)

    def _raft(self, args: list[str]) -> Raft:
        return self.nodes[int(args[0])]

    def _proposed(self, position: object) -> None:
        self.output.append(f"proposed at {position.index}/{position.term}")  # type: ignore[attr-defined]

    # Nodes.

    def add_nodes(self, args: list[str], options: dict[str, str]) -> None:
        nodes = range(1, int(args[0]) + 1)
        of_node = {
            key: {node: options.pop(f"{key}{node}") for node in nodes if f"{key}{node}" in options}
            for key in ("log", "hard", "snap")
        }
        members = read_members(args, options)
        if not members.all:
            members = Members(tuple(nodes))
        config = {key: value for key, value in options.items() if not hasattr(members, key)}
        self.options = {"election_ticks": "10", "heartbeat_ticks": "1", **config}
        for node in nodes:
            start = tuple(map(int, of_node["snap"].get(node, "0/0").split("/")))
            terms = [int(term) for term in of_node["log"].get(node, "").split(",") if term]
            hard_state = HardState(term=terms[-1] if terms else start[1])
            if node in of_node["hard"]:
                hard_state = HardState(*map(int, of_node["hard"][node].split("/")))
            self.disks[node] = Disk(members, hard_state, (start[0], start[1]), terms, [0] * len(terms))
            self.disks[node].snapshot = SnapshotMeta(start[0], start[1], members) if start[0] else None
        for node in nodes:
            self.restart(node)

    def add_node(self, node: int, members: Members) -> None:
        self.disks[node] = Disk(members)
        self.restart(node)

    def define(self, args: list[str], options: dict[str, str]) -> None:
        index, term = map(int, args[0].split("/"))
        self.changes[index, term] = read_members(args, options)

    def restart(self, node: int) -> None:
        disk = self.disks[node]
        config: dict[str, object] = {}
        # What is said of this node goes before what is said of all.
        for key, value in sorted(self.options.items(), key=lambda option: "@" in option[0]):
            name, _, only = key.partition("@")
            if not only or int(only) == node:
                config[name] = read_option(value)
        entries = TermIndex(disk.start[0] + 1, disk.start[1])
        entries.append(EntrySpan.of(disk.start[0] + 1, disk.terms, disk.sizes))
        positions = enumerate(disk.terms, disk.start[0] + 1)
        self.nodes[node] = Raft(
            RaftConfig(id=node, random=ScriptedRandom(node), **config),  # type: ignore[arg-type]
            MemoryStorage(
                entries,
                disk.hard_state,
                members=disk.genesis if disk.snapshot is None else disk.snapshot.members,
                snapshot=disk.snapshot,
                changes=[index for index, term in positions if (index, term) in self.changes],
                applied_index=0 if disk.snapshot is None else disk.snapshot.index,
            ),
        )
        self.to_apply[node] = deque()
        self.clocks.setdefault(node, CLOCK_START_US)

    def crash(self, args: list[str], _: dict[str, str]) -> None:
        del self.nodes[int(args[0])]
        self.disks[int(args[0])].writes.clear()

    # The driver.

    def ready(self, node: int) -> bool:
        raft, disk = self.nodes[node], self.disks[node]
        if not raft.has_ready():
            return False
        ready = raft.ready()
        for event in ready.events:
            noop = f" no-op at {event.noop_index}" if event.noop_index else ""
            self.output.append(f"{node}: {event.role.value} term={event.term} leader={event.leader}{noop}")
        for made in ready.memberships:
            self.changes[made.index, made.term] = made.members
            self.output.append(f"{node}: entry {made.index}/{made.term} makes {show_members(made.members)}")
        self._send(ready.messages)
        if ready.number:
            span = None if ready.append is None else raft.log.span(ready.append.first, ready.append.end)
            terms, sizes = ([], []) if span is None else (span.terms(), span.sizes())
            disk.writes.append((ready, terms, sizes))
            parts = [] if ready.hard_state is None else [f"term={ready.hard_state.term} vote={ready.hard_state.vote}"]
            parts += [] if ready.snapshot is None else [f"after snapshot {ready.snapshot.index}"]
            parts += [] if ready.append is None else [show_span(ready.append)]
            self.output.append(f"{node}: write {ready.number}: {' '.join(parts)}")
        else:
            # Only the commit index is new: a hint, worth writing when no older hard state is still on its way.
            if ready.hard_state is not None and not disk.writes:
                disk.hard_state = ready.hard_state
            self._send(ready.messages_after_persist)
        if ready.committed is not None:
            terms = raft.log.span(ready.committed.first, ready.committed.end).terms()
            self.to_apply[node].append((ready.committed, terms))
        self._apply_unless_held(node)
        for answer in ready.reads:
            self.output.append(f"{node}: read {answer.request} at {answer.index or 'no index: ask again'}")
        return True

    def persist(self, node: int, count: int) -> None:
        disk = self.disks[node]
        done = [disk.writes.popleft() for _ in range(count)]
        for write in done:
            disk.write(*write)
            if write[0].snapshot is not None:
                self.to_apply[node].append(write[0].snapshot)
        self.nodes[node].persisted(done[-1][0].number)
        self._apply_unless_held(node)
        for ready, _, _ in done:
            self._send(ready.messages_after_persist)

    def _apply_unless_held(self, node: int) -> None:
        if (node, "apply") not in self.held:
            self.apply(node, len(self.to_apply[node]))

    def apply(self, node: int, count: int) -> None:
        raft = self.nodes[node]
        for _ in range(count):
            item = self.to_apply[node].popleft()
            if isinstance(item, SnapshotMeta):
                self.output.append(f"{node}: restore {item.index}")
                raft.applied(item.index)
                self._say_members(node)
                continue
            span, terms = item
            self.output.append(f"{node}: apply {show_span(span)}")
            for index, term in enumerate(terms, span.first):
                members = self.changes.get((index, term))
                if members is not None:
                    raft.apply_membership(members)
                    self._say_members(node)
                raft.applied(index)

    def process(self, nodes: list[int]) -> bool:
        moved = False
        for node in nodes:
            while node in self.nodes and (self.ready(node) or self._to_persist(node)):
                moved = True
                if self._to_persist(node):
                    self.persist(node, self._to_persist(node))
        return moved

    def _to_persist(self, node: int) -> int:
        return 0 if (node, "disk") in self.held else len(self.disks[node].writes)

    def snapshot(self, node: int) -> None:
        raft = self.nodes[node]
        index = raft.applied_index
        meta = SnapshotMeta(index, raft.log.term_at(index), raft.members)
        raft.snapshot_taken(meta)
        self.disks[node].snapshot = meta
        self.output.append(f"{node}: snapshot {meta.index}/{meta.term} of {show_members(meta.members)}")

    def purge(self, node: int, index: int) -> None:
        raft = self.nodes[node]
        raft.purge(index)
        if index == raft.log.first_index - 1:
            self.disks[node].start_after(index, raft.log.term_at(index))

    def _send(self, messages: tuple[Message, ...]) -> None:
        self.network.extend(messages)
        self.output.extend(show(message) for message in messages)

    # The network.

    def _take(self, options: dict[str, str]) -> list[Message]:
        chosen = [
            message
            for message in self.network
            if int(options.get("from", message.sender)) == message.sender
            and int(options.get("to", message.to)) == message.to
            and options.get("kind", message.kind.name) == message.kind.name
        ][int(options.get("skip", "0")) :][: int(options.get("n", "1000000"))]
        for message in chosen:
            self.network.remove(message)
        return chosen

    def deliver(self, options: dict[str, str]) -> bool:
        messages = self._take(options)
        for message in messages:
            if message.to in self.nodes:
                try:
                    self.nodes[message.to].step(message)
                except MarbleError as error:
                    self.output.append(f"{message.to}: {type(error).__name__}: {error}")
        return bool(messages)

    def drop(self, options: dict[str, str]) -> None:
        self.output.extend(f"dropped {show(message)}" for message in self._take(options))

    def double(self, _: list[str], options: dict[str, str]) -> None:
        messages = self._take(options)
        self.network.extend(messages + messages)

    def stabilize(self, nodes: list[int]) -> None:
        moved = True
        while moved:
            moved = self.process(nodes)
            for message in [m for m in self.network if m.sender in nodes and m.to in nodes]:
                moved |= self.deliver({"from": str(message.sender), "to": str(message.to), "n": "1"})

    def step(self, args: list[str], options: dict[str, str]) -> None:
        sender, to, kind = int(args[0]), int(args[1]), MessageKind[args[2]]
        terms, changes = options.pop("terms", None), options.pop("changes", None)
        numbers = {key: int(value) for key, value in options.items() if not hasattr(Members(), key)}
        fields: dict[str, object] = {**numbers, "reject": "reject" in args}
        if kind is MessageKind.APPEND_ENTRIES:
            span = [int(term) for term in terms.split(",")] if terms else []
            fields["entries"] = EntrySpan.of(int(options.get("log_index", "0")) + 1, span)
            fields["changes"] = tuple(int(index) for index in changes.split(",")) if changes else ()
        if kind is MessageKind.INSTALL_SNAPSHOT:
            fields["members"] = read_members(args, options)
        self.nodes[to].step(Message(kind=kind, sender=sender, to=to, **fields))  # type: ignore[arg-type]

    # Inputs.

    def propose(self, args: list[str], _: dict[str, str]) -> None:
        self._proposed(self._raft(args).propose([int(size) for size in args[1].split(",")]))

    def propose_membership(self, args: list[str], _: dict[str, str]) -> None:
        transition = Transition(args.pop()) if args[-1] in ("joint", "explicit") else Transition.AUTO
        changes = [read_change(word) for word in args[1:]]
        self._proposed(self._raft(args).propose_membership(changes, transition))

    def read(self, args: list[str], _: dict[str, str]) -> None:
        now_us = self.clocks[int(args[0])]
        self._raft(args).read_index(int(args[1]), now_us, lease="lease" in args)

    def tick(self, node: int, count: int) -> None:
        for _ in range(count):
            self.clocks[node] += int(self.options.get("tick_us", "100000"))
            self.nodes[node].tick(self.clocks[node])

    def rounds(self, args: list[str], options: dict[str, str]) -> None:
        leader = int(args[0])
        for _ in range(int(options.get("n", "1"))):
            self.tick(leader, 1)
            self.stabilize(self._ids(args if len(args) > 1 else []))

    # What there is.

    def show_log(self, nodes: list[int]) -> None:
        for node in nodes:
            raft = self.nodes[node]
            terms = ",".join(map(str, raft.log.terms())) or "empty"
            first = f" from {raft.log.first_index}" if raft.log.first_index > 1 else ""
            self.output.append(f"{node}: {terms}{first} persisted={raft.persisted_index} commit={raft.commit_index}")

    def show_status(self, nodes: list[int]) -> None:
        for node in nodes:
            raft = self.nodes[node]
            text = (
                f"{node}: {raft.role.value} term={raft.term} vote={raft.vote} leader={raft.leader} "
                f"last={raft.last_index} persisted={raft.persisted_index} "
                f"commit={raft.commit_index} applied={raft.applied_index}"
            )
            text += f" transferee={raft.transferee}" if raft.transferee else ""
            text += f" lease-until={raft.lease_until_us} clock={self.clocks[node]}" if raft.lease_until_us else ""
            self.output.append(text + (" asleep" if raft.quiesced else ""))

    def _say_members(self, node: int) -> None:
        self.output.append(f"{node}: members {show_members(self.nodes[node].members)}")

    def show_progress(self, args: list[str], _: dict[str, str]) -> None:
        raft = self._raft(args)
        if raft.role is not Role.LEADER:
            self.output.append(f"{args[0]}: no leader")
        self.output.extend(f"{peer}: {progress}" for peer, progress in raft.progress.items())


def play(text: str) -> str:
    """The transcript with every output as it is now."""
    harness = Harness()
    result: list[str] = []
    commands: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.strip() == "----":
            harness.output = []
            for command in commands:
                harness.run(command)
            commands = []
            result.extend(["----", *(harness.output or ["ok"]), ""])
            for old in lines:
                if not old.strip():
                    break
        else:
            result.append(line)
            if line.strip() and not line.startswith("#"):
                commands.append(line)
    return "\n".join(result).rstrip("\n") + "\n"


def transcripts() -> list[Path]:
    return sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
