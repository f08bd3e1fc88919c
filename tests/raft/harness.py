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
n``.

Commands (``ID`` is a node; ``from= to= kind= skip= n=`` choose messages of the network)::

    add-nodes N [KEY=VALUE of RaftConfig ...] [logID=TERMS] [hardID=TERM/VOTE/COMMIT]
    campaign ID [force]          propose ID SIZE,...      read ID REQUEST         tick ID [n=1]
    ready ID                     take one Ready; send what may go at once, start the write, apply
    persist ID [n=1]             the first n writes under way are durable: report the last, then send what waited
    process [ID ...]             ready and persist until there is nothing to do
    deliver | drop | double [from=ID] [to=ID] [kind=KIND] [skip=COUNT] [n=COUNT]
    stabilize [ID ...]           process and deliver among these nodes until nothing moves
    step FROM TO KIND [FIELD=VALUE ...] [terms=T,...]     a message made by hand
    crash ID                     lose all but what is durable    restart ID
    unreachable ID PEER          log [ID]    status [ID]    progress ID    messages
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from marble._core.term_index import EntrySpan
from marble.errors import MarbleError
from marble.raft.core import MemoryStorage, Raft, RaftConfig
from marble.raft.messages import Message, MessageKind, Ready, Span
from marble.types import HardState, Role


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

    hard_state: HardState = field(default_factory=HardState)
    terms: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    writes: deque[tuple[Ready, list[int], list[int]]] = field(default_factory=deque)


def show(message: Message) -> str:
    """One message on one line: only what its kind uses."""
    kind = message.kind
    text = f"{message.sender}->{message.to} {kind.name} term={message.term}"
    if kind in (MessageKind.REQUEST_VOTE, MessageKind.REQUEST_PRE_VOTE):
        text += f" last={message.log_index}/{message.log_term}"
    elif message.entries is not None:
        entries = message.entries
        text += f" previous={message.log_index}/{message.log_term} commit={message.commit}"
        if entries:
            terms = entries.terms()
            shown = str(terms[0]) if terms[0] == terms[-1] else ",".join(map(str, terms))
            text += f" entries=[{entries.first},{entries.end}) of term {shown} bytes={entries.bytes}"
    elif kind is MessageKind.APPEND_ENTRIES_RESPONSE:
        text += f" index={message.log_index}"
        if message.reject:
            text += f" hint={message.reject_hint}/{message.log_term}"
    elif kind is MessageKind.HEARTBEAT:
        text += f" commit={message.commit}"
    elif kind is MessageKind.READ_INDEX_RESPONSE:
        text += f" index={message.log_index}"
    if message.context:
        text += f" context={message.context}"
    return text + (" REJECT" if message.reject else "")


def show_span(span: Span) -> str:
    return f"[{span.first},{span.end})"


class Harness:
    """The nodes of one transcript and the network between them."""

    def __init__(self) -> None:
        self.nodes: dict[int, Raft] = {}
        self.disks: dict[int, Disk] = {}
        self.network: list[Message] = []
        self.output: list[str] = []
        self.options: dict[str, int | bool] = {}
        self.commands: dict[str, Callable[[list[str], dict[str, str]], None]] = {
            "add-nodes": self.add_nodes,
            "campaign": lambda args, _: self.nodes[int(args[0])].campaign(force="force" in args),
            "propose": self.propose,
            "read": lambda args, _: self.nodes[int(args[0])].read_index(int(args[1])),
            "tick": lambda args, options: self.tick(int(args[0]), int(options.get("n", "1"))),
            "ready": lambda args, _: self.ready(int(args[0])),
            "persist": lambda args, options: self.persist(int(args[0]), int(options.get("n", "1"))),
            "process": lambda args, _: self.process(self._ids(args)),
            "deliver": lambda _, options: self.deliver(options),
            "drop": lambda _, options: self.drop(options),
            "double": self.double,
            "stabilize": lambda args, _: self.stabilize(self._ids(args)),
            "step": self.step,
            "crash": self.crash,
            "restart": lambda args, _: self.restart(int(args[0])),
            "unreachable": lambda args, _: self.nodes[int(args[0])].report_unreachable(int(args[1])),
            "log": lambda args, _: self.show_log(self._ids(args)),
            "status": lambda args, _: self.show_status(self._ids(args)),
            "progress": self.show_progress,
            "messages": lambda _, __: self.output.extend(show(message) for message in self.network),
        }

    def run(self, line: str) -> None:
        """One command line. An error of marble is output, any other is the transcript's fault."""
        name, *words = line.split()
        options = dict(word.split("=", 1) for word in words if "=" in word)
        try:
            self.commands[name]([word for word in words if "=" not in word], options)
        except MarbleError as error:
            self.output.append(f"{type(error).__name__}: {error}")

    def _ids(self, args: list[str]) -> list[int]:
        return [int(arg) for arg in args] if args else sorted(self.nodes)

    # Nodes.

    def add_nodes(self, args: list[str], options: dict[str, str]) -> None:
        count = int(args[0])
        logs = {key[3:]: options.pop(key) for key in list(options) if key.startswith("log")}
        hard = {key[4:]: options.pop(key) for key in list(options) if key.startswith("hard")}
        self.options = {"election_ticks": 10, "heartbeat_ticks": 1}
        for key, value in options.items():
            self.options[key] = value == "true" if value in ("true", "false") else int(value)
        for node in range(1, count + 1):
            terms = [int(term) for term in logs.get(str(node), "").split(",") if term]
            hard_state = HardState(term=terms[-1] if terms else 0)
            if str(node) in hard:
                hard_state = HardState(*(int(number) for number in hard[str(node)].split("/")))
            self.disks[node] = Disk(hard_state, terms, [0] * len(terms))
        for node in self.disks:
            self.restart(node)

    def restart(self, node: int) -> None:
        disk = self.disks[node]
        entries = EntrySpan.of(1, disk.terms, disk.sizes)
        config = RaftConfig(id=node, random=ScriptedRandom(node), **self.options)  # type: ignore[arg-type]
        self.nodes[node] = Raft(config, MemoryStorage(entries, disk.hard_state, sorted(self.disks)))

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
        self._send(ready.messages)
        if ready.number:
            span = None if ready.append is None else raft.log.span(ready.append.first, ready.append.end)
            terms, sizes = ([], []) if span is None else (span.terms(), span.sizes())
            disk.writes.append((ready, terms, sizes))
            parts = [] if ready.hard_state is None else [f"term={ready.hard_state.term} vote={ready.hard_state.vote}"]
            parts += [] if ready.append is None else [show_span(ready.append)]
            self.output.append(f"{node}: write {ready.number}: {' '.join(parts)}")
        else:
            # Only the commit index is new: a hint, worth writing when no older hard state is still on its way.
            if ready.hard_state is not None and not disk.writes:
                disk.hard_state = ready.hard_state
            self._send(ready.messages_after_persist)
        if ready.committed is not None:
            self.output.append(f"{node}: apply {show_span(ready.committed)}")
            raft.applied(ready.committed.end - 1)
        for answer in ready.reads:
            self.output.append(f"{node}: read {answer.request} at {answer.index or 'no index: ask again'}")
        return True

    def persist(self, node: int, count: int) -> None:
        disk = self.disks[node]
        done = [disk.writes.popleft() for _ in range(count)]
        for ready, terms, sizes in done:
            if ready.hard_state is not None:
                disk.hard_state = ready.hard_state
            if ready.append is not None:
                disk.terms[ready.append.first - 1 :] = terms
                disk.sizes[ready.append.first - 1 :] = sizes
        self.nodes[node].persisted(done[-1][0].number)
        for ready, _, _ in done:
            self._send(ready.messages_after_persist)

    def process(self, nodes: list[int]) -> bool:
        moved = False
        for node in nodes:
            while node in self.nodes and (self.ready(node) or self.disks[node].writes):
                moved = True
                if self.disks[node].writes:
                    self.persist(node, len(self.disks[node].writes))
        return moved

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
        terms = options.pop("terms", None)
        fields: dict[str, object] = {key: int(value) for key, value in options.items()}
        fields["reject"] = "reject" in args
        if kind is MessageKind.APPEND_ENTRIES:
            span = [int(term) for term in terms.split(",")] if terms else []
            fields["entries"] = EntrySpan.of(int(options.get("log_index", "0")) + 1, span)
        self.nodes[to].step(Message(kind=kind, sender=sender, to=to, **fields))  # type: ignore[arg-type]

    # Inputs.

    def propose(self, args: list[str], _: dict[str, str]) -> None:
        position = self.nodes[int(args[0])].propose([int(size) for size in args[1].split(",")])
        self.output.append(f"proposed at {position.index}/{position.term}")

    def tick(self, node: int, count: int) -> None:
        for _ in range(count):
            self.nodes[node].tick()

    # What there is.

    def show_log(self, nodes: list[int]) -> None:
        for node in nodes:
            raft = self.nodes[node]
            terms = ",".join(map(str, raft.log.terms())) or "empty"
            self.output.append(f"{node}: {terms} persisted={raft.persisted_index} commit={raft.commit_index}")

    def show_status(self, nodes: list[int]) -> None:
        for node in nodes:
            raft = self.nodes[node]
            self.output.append(
                f"{node}: {raft.role.value} term={raft.term} vote={raft.vote} leader={raft.leader} "
                f"last={raft.last_index} persisted={raft.persisted_index} "
                f"commit={raft.commit_index} applied={raft.applied_index}"
            )

    def show_progress(self, args: list[str], _: dict[str, str]) -> None:
        raft = self.nodes[int(args[0])]
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
