"""Snapshots, and files that they refer to, on their way between the nodes of one group: the side that hands them out.

The leader's core decides that a peer needs a snapshot (INSTALL_SNAPSHOT); what travels with that message describes it. The
peer's driver asks for the pieces (SNAPSHOT_FETCH, each answered by SNAPSHOT_PIECE; `marble.fetching`), writes them in order to
files, and only when all are whole and verified does its core see the INSTALL_SNAPSHOT.

Rule 1: the receiver drives. A sender keeps nothing of what it has sent.
Rule 2: a snapshot that is being fetched is pinned at its sender, with all files that it refers to, as is the log behind it, or
the peer would need another one as soon as it has this one. A peer that asks for nothing any more loses that, and its core is
told.
Rule 3: any node hands out any file that it has by its name. What is known to be damaged is handed to nobody.

Messages of drivers carry the sender's term but prove nothing by it: a snapshot is a committed prefix, whoever sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from marble.errors import CorruptionError, ProtocolError, UnavailableError
from marble.fetching import Fetching
from marble.jobs import DiscardJob, ReceiveJob
from marble.logstore.snapshots import SnapshotInfo, SnapshotStore
from marble.raft.messages import Message, MessageKind
from marble.raft.progress import Progress, ProgressState
from marble.rebuilding import DESCRIPTION, describe
from marble.transport.codec import Envelope
from marble.transport.snapshot_rows import offer_of, offer_row, piece_row
from marble.transport.window import Window
from marble.types import Position


@dataclass(slots=True)
class _Sending:
    """A peer fetches `info`, which is pinned. ``ticks`` since it asked for anything of it, or was offered it; whether it ``asked``."""

    info: SnapshotInfo
    ticks: int = 0
    asked: bool = False


class Transfer:
    """Both sides of one group. The driver's thread owns it.

    Parameters
    ----------
    group, node_id
        Stamped on messages.
    store
        The group's snapshots.
    post
        Sends an envelope.
    piece_bytes_max
        What one message carries of a snapshot.
    patience_ticks
        After so many ticks without an answer a piece is asked for again, three times as a rule; a sender waits ten times
        as long for its peer, and once as long for the first thing that it asks for.
    healed
        Told the name of a damaged file that was fetched anew (`marble.machine.HealingMachine`); by a job.
    window_bytes_max
        Of pieces that this node has asked for and not written yet.
    """

    def __init__(
        self,
        group: int,
        node_id: int,
        store: SnapshotStore,
        post: Callable[[Envelope], None],
        piece_bytes_max: int,
        patience_ticks: int,
        healed: Callable[[str], None] | None = None,
        window_bytes_max: int = 16 << 20,
    ) -> None:
        self._group = group
        self._node_id = node_id
        self._store = store
        self._post = post
        self._piece_bytes_max = piece_bytes_max
        self._patience_ticks = patience_ticks
        self._sending: dict[int, _Sending] = {}
        self._lent: dict[int, _Sending] = {}
        """Snapshots that peers build from: pinned as well, but the log behind them need not stay."""
        window = Window(window_bytes_max, piece_bytes_max)
        self.fetching = Fetching(
            node_id, store, lambda message: post(Envelope(group, message)), patience_ticks, window, healed
        )

    # -- sending -----------------------------------------------------------------------------------------------------

    @property
    def pinned_index(self) -> int | None:
        """The oldest snapshot that a peer is fetching: the log behind it must stay. None if nobody is."""
        return min((sending.info.index for sending in self._sending.values()), default=None)

    def offer(self, message: Message) -> Envelope:
        """What the core's INSTALL_SNAPSHOT becomes: the message with its row. The snapshot is pinned from now on.

        Raises UnavailableError if the snapshot is not here.
        """
        info = self._find(message.log_index, message.log_term)
        if info is None:
            raise UnavailableError(f"there is no snapshot at {message.log_index} of term {message.log_term} here")
        self.release(message.to)
        self._store.pin(info.index)
        self._sending[message.to] = _Sending(info)
        return Envelope(
            self._group, message, offer_row(self._group, info.meta, info.endpoints, info.nbytes, info.checksum)
        )

    def serve(self, fetch: Message, term: int) -> None:
        """Answer a SNAPSHOT_FETCH."""
        if fetch.context == DESCRIPTION:
            self._describe(fetch, term)
            return
        for sending in (self._sending.get(fetch.sender), self._lent.get(fetch.sender)):
            # A peer that heals files of its own asks, too, and is no nearer to the snapshot that was offered to it.
            if sending is not None and (sending.info.index, sending.info.term) == (fetch.log_index, fetch.log_term):
                sending.ticks, sending.asked = 0, True
        row = None
        try:
            data = self._piece(fetch)
        except (UnavailableError, CorruptionError):
            pass  # The answer without a row says so: the peer asks for it elsewhere.
        else:
            row = piece_row(self._group, Position(fetch.log_index, fetch.log_term), fetch.context, data)
        answer = Message(
            MessageKind.SNAPSHOT_PIECE,
            self._node_id,
            fetch.sender,
            term,
            log_index=fetch.log_index,
            log_term=fetch.log_term,
            reject=row is None,
            reject_hint=fetch.reject_hint,
            context=fetch.context,
        )
        self._post(Envelope(self._group, answer, row))

    def _describe(self, fetch: Message, term: int) -> None:
        """Tell a peer of the newest snapshot here, and keep that while it is asked for."""
        self._take_back(fetch.sender)
        info = self._store.newest()
        position, row = Position(0, 0), None
        if info is not None:
            self._store.pin(info.index)
            self._lent[fetch.sender] = _Sending(info)
            position = Position(info.index, info.term)
            row = piece_row(self._group, position, DESCRIPTION, describe(info))
        answer = Message(
            MessageKind.SNAPSHOT_PIECE,
            self._node_id,
            fetch.sender,
            term,
            log_index=position.index,
            log_term=position.term,
            reject=row is None,
            context=DESCRIPTION,
        )
        self._post(Envelope(self._group, answer, row))

    def _take_back(self, peer: int) -> None:
        """`peer` asks no longer for what it was lent."""
        lent = self._lent.pop(peer, None)
        if lent is not None:
            self._store.unpin(lent.info.index)

    def _piece(self, fetch: Message) -> bytes:
        """What is asked for. Raises UnavailableError or CorruptionError if it is not to be had here."""
        if not fetch.log_index or not fetch.log_term:
            raise ProtocolError(f"node {fetch.sender} asks for a piece of nothing")
        if fetch.reject_hint:
            return self._store.contents.piece(fetch.reject_hint, fetch.context, self._piece_bytes_max)
        info = self._find(fetch.log_index, fetch.log_term)
        if info is None:
            raise UnavailableError("there is no such snapshot here")
        try:
            return self._store.piece(info, fetch.context, self._piece_bytes_max)
        except OSError as error:
            raise UnavailableError(f"a snapshot could not be read: {error}") from error

    def release(self, peer: int) -> None:
        """`peer` needs its snapshot no longer."""
        sending = self._sending.pop(peer, None)
        if sending is not None:
            self._store.unpin(sending.info.index)

    def _find(self, index: int, term: int) -> SnapshotInfo | None:
        return next((info for info in self._store.infos() if (info.index, info.term) == (index, term)), None)

    # -- receiving ---------------------------------------------------------------------------------------------------

    @property
    def receiving(self) -> SnapshotInfo | None:
        """What is being fetched."""
        return self.fetching.info

    def offered(self, envelope: Envelope) -> Message | None:
        """A leader's INSTALL_SNAPSHOT: fetch what it offers.

        Returns the message if the core may see it now, because the snapshot is here already.
        """
        message = envelope.message
        if envelope.batch is None:
            raise ProtocolError(f"node {message.sender} offers a snapshot and does not describe it")
        if self._find(message.log_index, message.log_term) is not None:
            return message
        offer = offer_of(envelope.batch)
        info = SnapshotInfo(
            self._group,
            offer.meta.index,
            offer.meta.term,
            offer.meta.members,
            offer.endpoints,
            offer.nbytes,
            offer.checksum,
        )
        self.fetching.want(message, info)
        return None

    def arrived(self, envelope: Envelope) -> Message | None:
        """A SNAPSHOT_PIECE. Returns an answer for the leader if there is nothing to be fetched any more."""
        return self.fetching.arrived(envelope)

    def take_job(self) -> ReceiveJob | DiscardJob | None:
        """What is to be done with files next; `finish_job` follows."""
        return self.fetching.take_job()

    def finish_job(self, job: ReceiveJob | DiscardJob) -> Message | None:
        """`job` has run. Returns a message for the core: that of the leader if all is here, or a refusal to be sent."""
        return self.fetching.finish_job(job)

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self, progress: Mapping[int, Progress]) -> list[int]:
        """A tick has passed. `progress` is the core's. Returns the peers that have fallen silent."""
        silent = []
        for peer, sending in sorted(self._sending.items()):
            sending.ticks += 1
            state = progress.get(peer)
            if state is None or state.state is not ProgressState.SNAPSHOT:
                self.release(peer)
            # Who has not asked at all has most likely not heard the offer. It is made again, and changes nothing where it was heard.
            elif sending.ticks > (10 if sending.asked else 1) * self._patience_ticks:
                self.release(peer)
                silent.append(peer)
        for peer, lent in list(self._lent.items()):
            lent.ticks += 1
            if lent.ticks > 10 * self._patience_ticks:
                self._take_back(peer)
        self.fetching.tick()
        return silent
