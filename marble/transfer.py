"""Snapshots on their way between the nodes of one group: offered by a leader, fetched piece by piece by a follower.

The leader's core decides that a peer needs a snapshot (INSTALL_SNAPSHOT); what travels with that message describes it. The
peer's driver asks for one piece after the other (SNAPSHOT_FETCH, answered by SNAPSHOT_PIECE), writes them to a file, and
only when that is whole and verified does its core see the INSTALL_SNAPSHOT.

Rule 1: the receiver drives. One piece is under way at a time; it is asked for again when no answer came. So a lost message
costs a wait, a slow receiver slows nobody else, and what has arrived before a restart need not come again.
Rule 2: a snapshot that is being fetched is pinned at its sender, as is the log behind it, or the peer would need another
one as soon as it has this one. A peer that asks for nothing any more loses that, and its core is told.

Messages of drivers carry the sender's term but prove nothing by it: a snapshot is a committed prefix, whoever sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from marble.errors import ProtocolError, UnavailableError
from marble.jobs import DiscardJob, ReceiveJob
from marble.logstore.snapshots import SnapshotInfo, SnapshotStore
from marble.raft.messages import Message, MessageKind
from marble.raft.progress import Progress, ProgressState
from marble.transport.codec import Envelope
from marble.transport.snapshot_rows import offer_of, offer_row, piece_of, piece_row
from marble.types import Position


@dataclass(slots=True)
class _Sending:
    """A peer fetches `info`, which is pinned. ``ticks`` since it asked for anything."""

    info: SnapshotInfo
    ticks: int = 0


@dataclass(slots=True)
class _Fetching:
    """The snapshot that is being fetched for `offer`, the leader's message.

    - ``asked`` is the offset of the piece that is on its way, -1 while none is.
    - ``ticks`` since it was asked for; ``silent`` times it was asked for again.
    """

    offer: Message
    info: SnapshotInfo
    asked: int = -1
    ticks: int = 0
    silent: int = 0


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
        as long for its peer.
    """

    def __init__(
        self,
        group: int,
        node_id: int,
        store: SnapshotStore,
        post: Callable[[Envelope], None],
        piece_bytes_max: int,
        patience_ticks: int,
    ) -> None:
        self._group = group
        self._node_id = node_id
        self._store = store
        self._post = post
        self._piece_bytes_max = piece_bytes_max
        self._patience_ticks = patience_ticks
        self._sending: dict[int, _Sending] = {}
        self._fetching: _Fetching | None = None
        self._job: ReceiveJob | DiscardJob | None = None

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
        sending = self._sending.get(fetch.sender)
        if sending is not None:
            sending.ticks = 0
        info, row = self._find(fetch.log_index, fetch.log_term), None
        if info is not None:
            try:
                data = self._store.piece(info, fetch.context, self._piece_bytes_max)
                row = piece_row(self._group, Position(info.index, info.term), fetch.context, data)
            except UnavailableError:
                pass  # It went between the two calls: the answer without a row says so.
        self._post(
            Envelope(
                self._group,
                Message(
                    MessageKind.SNAPSHOT_PIECE,
                    self._node_id,
                    fetch.sender,
                    term,
                    log_index=fetch.log_index,
                    log_term=fetch.log_term,
                    reject=row is None,
                    context=fetch.context,
                ),
                row,
            )
        )

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
        return None if self._fetching is None else self._fetching.info

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
        fetching = self._fetching
        if fetching is not None and fetching.info == info:
            # The same again, perhaps of another leader: go on where it stands.
            fetching.offer, fetching.silent = message, 0
            return None
        if fetching is not None and fetching.info.index > info.index and fetching.offer.term >= message.term:
            return None  # An old message.
        self._fetching = _Fetching(message, info)
        if self._job is None:
            self._job = ReceiveJob(self._store, info, None)
        return None

    def arrived(self, envelope: Envelope) -> Message | None:
        """A SNAPSHOT_PIECE. Returns an answer for the leader if there is nothing to be fetched any more."""
        fetching, piece = self._fetching, envelope.message
        if fetching is None or self._job is not None or piece.sender != fetching.offer.sender:
            return None
        if (piece.log_index, piece.log_term, piece.context) != (
            fetching.info.index,
            fetching.info.term,
            fetching.asked,
        ):
            return None
        if envelope.batch is None:
            return self._give_up(fetching)
        part = piece_of(envelope.batch)
        fetching.asked = -1
        self._job = ReceiveJob(self._store, fetching.info, (part.offset, part.data))
        return None

    def take_job(self) -> ReceiveJob | DiscardJob | None:
        """What is to be done with files next; `finish_job` follows."""
        return self._job

    def finish_job(self, job: ReceiveJob | DiscardJob) -> Message | None:
        """`job` has run. Returns a message for the core: that of the leader if all is here, or a refusal to be sent."""
        self._job = None
        fetching = self._fetching
        if fetching is None:
            return None
        if isinstance(job, DiscardJob) or job.info != fetching.info:
            # Another offer came meanwhile.
            self._job = ReceiveJob(self._store, fetching.info, None)
            return None
        if job.error is not None:
            return self._give_up(fetching)
        if job.complete:
            self._fetching = None
            return fetching.offer
        self._ask(fetching, job.offset)
        return None

    def _ask(self, fetching: _Fetching, offset: int) -> None:
        fetching.asked, fetching.ticks = offset, 0
        offer, info = fetching.offer, fetching.info
        message = Message(
            MessageKind.SNAPSHOT_FETCH,
            self._node_id,
            offer.sender,
            offer.term,
            log_index=info.index,
            log_term=info.term,
            context=offset,
        )
        self._post(Envelope(self._group, message))

    def _give_up(self, fetching: _Fetching) -> Message:
        """The snapshot is not to be had: tell who offered it, who may have a newer one."""
        self._fetching = None
        self._job = DiscardJob(self._group, self._store)
        offer = fetching.offer
        return Message(
            MessageKind.INSTALL_SNAPSHOT_RESPONSE,
            self._node_id,
            offer.sender,
            offer.term,
            log_index=offer.log_index,
            reject=True,
        )

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self, progress: Mapping[int, Progress]) -> list[int]:
        """A tick has passed. `progress` is the core's. Returns the peers that have fallen silent."""
        silent = []
        for peer, sending in sorted(self._sending.items()):
            sending.ticks += 1
            state = progress.get(peer)
            if state is None or state.state is not ProgressState.SNAPSHOT:
                self.release(peer)
            elif sending.ticks > 10 * self._patience_ticks:
                self.release(peer)
                silent.append(peer)
        fetching = self._fetching
        if fetching is not None and fetching.asked >= 0:
            fetching.ticks += 1
            if fetching.ticks > self._patience_ticks:
                fetching.silent += 1
                if fetching.silent > 3:
                    # Its sender is gone. What has arrived stays on the disk: the next leader may offer the same.
                    self._fetching = None
                else:
                    self._ask(fetching, fetching.asked)
        return silent
