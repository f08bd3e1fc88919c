"""What a node fetches from its peers: a snapshot with all files that it refers to, or files of its own that are damaged.

Of a snapshot the file itself comes first; it says which other files the state consists of. Of these only those come that are
not here: they are named by their content, so a file of this name is this file, whoever has made or sent it. What was
fetched for one snapshot serves the next one as well, of another leader, too, and after a restart.

Rule 1: the receiver asks for each piece, for as many ahead as the way takes (`marble.transport.window`), and again when no
answer came: a lost message costs a wait, a slow receiver slows nobody else, and what has arrived before a restart need not
come again.
Rule 2: a file is asked for at one peer after the other, the one that offered the snapshot first. What does not match its name
when it is whole is thrown away, and the next peer is asked: a damaged file spreads to nobody.
Rule 3: a snapshot is complete, and gets its name, only when all files that it refers to have theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from marble.errors import ProtocolError, check
from marble.jobs import DiscardJob, ReceiveJob
from marble.logstore.snapshots import SnapshotInfo, SnapshotStore
from marble.machine import FileRef
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Envelope
from marble.transport.snapshot_rows import piece_of
from marble.transport.window import Window
from marble.types import Position

ASKED_MAX: Final = 4
"""How often a piece is asked for at one peer."""

AHEAD_FILES_MAX: Final = 16
"""Files that pieces are asked for of at once, the one that is being written included."""

HEAL_AGAIN_FACTOR: Final = 10
"""After so many times the patience with one answer, all peers are asked once more for a file that none of them had."""


@dataclass(slots=True)
class _Asking:
    """The file that is being fetched: `ref`, or the snapshot's own.

    - ``sources[0]`` is being asked, those behind it are next; never empty.
    - ``offset`` of the bytes that no job has yet; -1 before the first job has seen what is there.
    - ``ticks`` since anything of what was asked for came; ``times`` it was asked for in vain.
    - ``resumed``: it goes on from what an earlier process, or a crash, has left, which may be at fault if it is wrong.
    """

    ref: FileRef | None
    sources: list[int]
    position: Position
    offset: int = -1
    ticks: int = 0
    times: int = 0
    first: bool = True
    resumed: bool = False

    @property
    def key(self) -> int:
        """What says in a message which file is meant."""
        return 0 if self.ref is None else self.ref.key


class Fetching:
    """One group's. The driver's thread owns it.

    Parameters
    ----------
    node_id
        This node.
    store
        Where snapshots go, and the files that they refer to.
    post
        Sends a message.
    patience_ticks
        After so many ticks without an answer a piece is asked for again.
    window
        What may be under way at once.
    healed
        Told the name of a damaged file that is sound again, by the job that receives it. None: files are not healed.
    """

    def __init__(
        self,
        node_id: int,
        store: SnapshotStore,
        post: Callable[[Message], None],
        patience_ticks: int,
        window: Window,
        healed: Callable[[str], None] | None,
    ) -> None:
        self.info: SnapshotInfo | None = None
        """The snapshot that is being fetched."""
        self.offer: Message | None = None
        """The leader's message that brought its description."""
        self._node_id = node_id
        self._store = store
        self._post = post
        self._patience_ticks = patience_ticks
        self._window = window
        self._healed = healed
        self._missing: list[FileRef] = []
        self._asking: _Asking | None = None
        self._job: ReceiveJob | DiscardJob | None = None
        self._wait: dict[str, int] = {}
        """Damaged file -> ticks before it is asked for again."""
        self._rebuild = False
        """Whether the snapshot is to be built from, and not to become one of this node (`marble.rebuilding`)."""
        self.built_from: SnapshotInfo | None = None
        """Such a one that is complete, for whoever takes it away."""

    # -- what is wanted ----------------------------------------------------------------------------------------------

    def in_vain(self, refs: Sequence[FileRef]) -> bool:
        """Whether all peers were asked for one of `refs` a while ago, and none had it."""
        return any(ref.name in self._wait for ref in refs)

    def want(self, message: Message, info: SnapshotInfo, *, rebuild: bool = False) -> None:
        """Fetch the snapshot `info`, which the leader's `message` offers; or, to `rebuild`, which its sender described."""
        offer, other, self._rebuild = self.offer, self._rebuild is not rebuild, rebuild
        if other:
            self.offer, self.info = message, info
            self._begin()
            return
        if self.info == info:
            # The same again, perhaps of another leader: go on where it stands.
            self.offer = message
            asking = self._asking
            if asking is not None:
                asking.times = 0
                before, asking.sources = asking.sources[0], [message.sender] if asking.ref is None else self._sources()
                if asking.sources[0] != before:
                    self._ask_anew(asking)
            return
        if self.info is not None and offer is not None and self.info.index > info.index and offer.term >= message.term:
            return  # An old message.
        self.offer, self.info = message, info
        self._begin()

    def heal(self, refs: Sequence[FileRef], peers: Sequence[int], position: Position) -> None:
        """Fetch a file that is damaged here, one of `refs`, from one of `peers`, unless there is something more urgent.

        `position` is any that a log has; nobody looks at it.
        """
        if self.info is not None or self._job is not None or self._asking is not None or self._healed is None:
            return
        ready = (ref for ref in refs if ref.name not in self._wait)
        ref = next(ready, None)
        if ref is not None and peers:
            self._window.reset()
            self._asking = _Asking(ref, list(peers), position)
            self._job = ReceiveJob(self._store, None, ref, healed=self._healed)

    def _begin(self) -> None:
        """Ask for what is wanted from the beginning, as soon as no job is out."""
        self._asking, self._missing = None, []
        self._window.reset()
        if self._job is None and self.info is not None:
            self._ask_for(None)

    def _ask_for(self, ref: FileRef | None) -> None:
        """Go on with the file `ref` of the snapshot, or with its own."""
        info, offer = self.info, self.offer
        assert info is not None
        assert offer is not None
        sources = [offer.sender] if ref is None else self._sources()
        self._asking = _Asking(ref, sources, Position(info.index, info.term))
        self._job = ReceiveJob(self._store, info, ref, keep=not self._rebuild)

    def _sources(self) -> list[int]:
        """Who may have a file of the snapshot: who offers it, then the others."""
        assert self.info is not None
        assert self.offer is not None
        first = self.offer.sender
        return [first, *(node for node in self.info.members.all if node not in (first, self._node_id))]

    # -- jobs --------------------------------------------------------------------------------------------------------

    def take_job(self) -> ReceiveJob | DiscardJob | None:
        """What is to be done with files next; `finish_job` follows."""
        return self._job

    def finish_job(self, job: ReceiveJob | DiscardJob) -> Message | None:
        """`job` has run. Returns a message for the core: that of the leader if all is here, or a refusal to be sent."""
        self._job = None
        asking = self._asking
        if isinstance(job, DiscardJob) or asking is None or (job.info, job.ref) != (self.info, asking.ref):
            # Something else is wanted by now.
            self._begin()
            return None
        if job.error is not None:
            return self._failed(asking, job.error)
        if job.complete:
            self.built_from = self.info if self._rebuild else None
            offer, self.info, self.offer, self._asking = self.offer, None, None, None
            self._window.reset()
            return None if self.built_from is not None else offer
        if job.missing:
            self._missing = job.missing
            self._ask_for(self._missing[0])
        elif not job.arrived:
            # Only the job that begins comes back before anything was asked for.
            asking.resumed |= asking.first and job.offset > 0
            asking.first = False
            asking.offset, asking.ticks = job.offset, 0
            self._go_on(asking)
        elif self.info is None:
            self._asking = None  # A file that was damaged is healed.
        else:
            self._window.forget(asking.key)
            self._missing = self._missing[1:]
            self._ask_for(self._missing[0] if self._missing else None)
        return None

    def _failed(self, asking: _Asking, error: Exception) -> Message | None:
        if asking.ref is None or isinstance(error, OSError):
            return self._give_up()
        if asking.resumed:
            asking.resumed = False
            asking.offset = 0
            self._window.reset()
            self._ask_anew(asking)
            return None
        # It was not the file that its name says, or a piece was not of it.
        return self._next_source(asking, again=True)

    def _next_source(self, asking: _Asking, again: bool = False) -> Message | None:
        """The peer that was asked cannot help: ask the next one. `again`: where the file stands is to be seen first."""
        asking.sources.pop(0)
        if not asking.sources:
            return self._give_up()
        asking.times = 0
        if again:
            self._window.reset()
            asking.offset = -1
            self._receive(asking, [])
        else:
            self._ask_anew(asking)
        return None

    def _give_up(self) -> Message | None:
        """It is not to be had. If that is a snapshot, tell who offered it, who may have a newer one."""
        asking, offer, info = self._asking, self.offer, self.info
        self.offer = self.info = self._asking = None
        self._window.reset()
        if offer is None or info is None:
            check(asking is not None and asking.ref is not None, "nothing was fetched, and that failed")
            assert asking is not None
            assert asking.ref is not None
            self._wait[asking.ref.name] = HEAL_AGAIN_FACTOR * self._patience_ticks
            return None
        self._job = DiscardJob(self._store.group, self._store)
        if self._rebuild:
            return None
        return Message(
            MessageKind.INSTALL_SNAPSHOT_RESPONSE,
            self._node_id,
            offer.sender,
            offer.term,
            log_index=offer.log_index,
            reject=True,
        )

    # -- messages ----------------------------------------------------------------------------------------------------

    def _ask_anew(self, asking: _Asking) -> None:
        """What is under way comes from somebody else, and is not waited for."""
        self._window.lost()
        asking.ticks = 0
        self._go_on(asking)

    def _go_on(self, asking: _Asking) -> None:
        """Give what is here to a job, unless one is out, and ask for what is wanted next."""
        if asking.offset >= 0 and self._job is None:
            pieces = self._window.take(asking.key, asking.offset)
            if pieces:
                offset, data = pieces[-1]
                asking.offset = offset + data.size
                self._receive(asking, pieces)
        if asking.offset < 0:
            return  # Where the file goes on is not known before its first job has looked.
        wanted = [(asking.key, asking.offset, self._nbytes(asking))]
        wanted += [(ref.key, 0, ref.nbytes) for ref in self._missing[1:AHEAD_FILES_MAX]]
        for key, offset in self._window.plan(wanted):
            self._ask(asking, key, offset)

    def _receive(self, asking: _Asking, pieces: list[tuple[int, pa.Buffer]]) -> None:
        # A file of a snapshot may be one that the machine has damaged: it need not wait for the rest.
        self._job = ReceiveJob(self._store, self.info, asking.ref, pieces, healed=self._healed, keep=not self._rebuild)

    def _nbytes(self, asking: _Asking) -> int:
        if asking.ref is not None:
            return asking.ref.nbytes
        assert self.info is not None
        return self.info.nbytes

    def _ask(self, asking: _Asking, key: int, offset: int) -> None:
        message = Message(
            MessageKind.SNAPSHOT_FETCH,
            self._node_id,
            asking.sources[0],
            0 if self.offer is None else self.offer.term,
            log_index=asking.position.index,
            log_term=asking.position.term,
            reject_hint=key,
            context=offset,
        )
        self._post(message)

    def arrived(self, envelope: Envelope) -> Message | None:
        """A SNAPSHOT_PIECE. Returns an answer for the leader if there is nothing to be fetched any more."""
        asking, piece = self._asking, envelope.message
        if asking is None or piece.sender != asking.sources[0]:
            return None
        if (piece.log_index, piece.log_term) != (asking.position.index, asking.position.term):
            return None
        key, offset = piece.reject_hint, piece.context
        if envelope.batch is None:
            self._window.refused(key, offset)
            # Of a file whose turn comes later, or while what came before is at work, it is asked for again.
            needed = self._job is None and (key, offset) == (asking.key, asking.offset)
            return self._next_source(asking) if needed else None
        part = piece_of(envelope.batch)
        if part.offset != offset:
            raise ProtocolError(f"a piece at {part.offset} in the answer to a question for {offset}")
        if self._window.keep(key, offset, part.data, (asking.key, asking.offset)):
            asking.ticks = asking.times = 0
            self._go_on(asking)
        return None

    def tick(self) -> None:
        """A tick has passed."""
        self._wait = {name: ticks - 1 for name, ticks in self._wait.items() if ticks > 1}
        self._window.tick()
        asking = self._asking
        if asking is None or self._job is not None:
            return
        asking.ticks += 1
        if asking.ticks <= self._patience_ticks:
            return
        asking.times += 1
        if asking.times < ASKED_MAX:
            asking.ticks = 0
            self._window.lost()
            self._go_on(asking)
        elif len(asking.sources) > 1:
            self._next_source(asking)
        elif self.info is None:
            self._give_up()
        else:
            # Its sender is gone. What has arrived stays on the disk: the next leader may offer the same.
            self.offer = self.info = self._asking = None
            self._window.reset()
