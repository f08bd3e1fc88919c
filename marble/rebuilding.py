"""A machine whose files are damaged, and whose peers do not have these files: it is built anew from a peer's snapshot.

Each node compacts for itself, so that a file may be at one node only. Then another node's newest snapshot is fetched, with all files
that are not here, the state is built from it beside the one that is there, brought up to the same entry by this node's own log, and
takes its place. Nothing of it concerns the core: a snapshot is a committed prefix, whoever made it, and so are the entries of the
log up to what is applied.

Rule 1: only when all peers were asked for a file in vain. A snapshot of the leader's core goes first, and ends this.
Rule 2: what readers see never goes back: of a state older than the present one nothing is shown before the log has made up for it.
A state that is newer is taken as a snapshot of the leader is, once this node knows all of it to be committed.
Rule 3: what is fetched is never this node's own snapshot: two of one entry may differ in their files. After the change one of
its own is written.

The question is a SNAPSHOT_FETCH of no snapshot, which says where the log of this node begins: a peer whose newest snapshot does not
reach so far takes another one. The answer is a SNAPSHOT_PIECE whose ``context`` is `DESCRIPTION` and whose data
`describe` made.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final

import pyarrow as pa

from marble.errors import ProtocolError
from marble.logstore.snapshots import SnapshotInfo
from marble.members import decode_members, encode_members
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Envelope
from marble.transport.snapshot_rows import piece_of

DESCRIPTION: Final = 2**62
"""Where in a snapshot's file its description stands in for bytes: no file is so long."""

ASK_AGAIN_FACTOR: Final = 10
"""After so many times the patience with one answer, all peers are asked once more."""

_HEAD: Final = struct.Struct("<QQ")
"""Length and checksum of the snapshot's file; what `encode_members` makes follows."""


def describe(info: SnapshotInfo) -> bytes:
    """What another node needs to fetch `info`."""
    members: bytes = encode_members(info.members, info.endpoints).to_pybytes()
    return _HEAD.pack(info.nbytes, info.checksum) + members


def described(group: int, envelope: Envelope) -> SnapshotInfo:
    """The snapshot that an answer describes. Raises ProtocolError if it describes none."""
    if envelope.batch is None:
        raise ProtocolError("a description without a row")
    piece = piece_of(envelope.batch)
    data = piece.data.to_pybytes()
    if piece.offset != DESCRIPTION or len(data) <= _HEAD.size:
        raise ProtocolError(f"{len(data)} bytes at {piece.offset} describe no snapshot")
    nbytes, checksum = _HEAD.unpack_from(data)
    if not 1 <= nbytes < DESCRIPTION:
        raise ProtocolError(f"a snapshot of {nbytes} bytes")
    members = pa.allocate_buffer(len(data) - _HEAD.size)
    memoryview(members).cast("B")[:] = data[_HEAD.size :]
    return SnapshotInfo(
        group, piece.position.index, piece.position.term, *decode_members(members), nbytes=nbytes, checksum=checksum
    )


class Rebuilding:
    """Who is asked for a snapshot to build from. The driver's thread owns it.

    - ``_sources[0]`` is being asked, those behind it are next; none while nobody is asked.

    Parameters
    ----------
    node_id
        This node.
    post
        Sends a message.
    patience_ticks
        After so many ticks without an answer the next peer is asked.
    """

    def __init__(self, node_id: int, post: Callable[[Message], None], patience_ticks: int) -> None:
        self._node_id = node_id
        self._post = post
        self._patience_ticks = patience_ticks
        self._sources: list[int] = []
        self._first_index = 0
        self._ticks = 0
        self._rest = 0

    def ask(self, peers: Sequence[int], term: int, first_index: int) -> None:
        """Ask `peers` for their newest snapshot, one after the other, unless that is being done or was done a moment ago.

        `first_index` is where the log begins here: a snapshot that does not reach so far is of no use.
        """
        if not self._sources and not self._rest and peers:
            self._sources, self._first_index = list(peers), first_index
            self._ask(term)

    def _ask(self, term: int) -> None:
        self._ticks = 0
        question = Message(
            MessageKind.SNAPSHOT_FETCH,
            self._node_id,
            self._sources[0],
            term,
            log_index=self._first_index,
            context=DESCRIPTION,
        )
        self._post(question)

    def expects(self, message: Message) -> bool:
        """Whether `message` is the answer to the question that is out."""
        return bool(self._sources) and message.sender == self._sources[0] and message.context == DESCRIPTION

    def next_source(self, term: int) -> None:
        """The peer that was asked cannot help: ask the next one, or all of them again after a while."""
        self._sources = self._sources[1:]
        if self._sources:
            self._ask(term)
        else:
            self.rest()

    def found(self) -> None:
        """An answer is of use: nobody else is asked."""
        self._sources = []

    def rest(self) -> None:
        """Nothing came of it: not again at once."""
        self._sources, self._rest = [], ASK_AGAIN_FACTOR * self._patience_ticks

    def tick(self, term: int) -> None:
        """A tick has passed."""
        self._rest = max(0, self._rest - 1)
        if self._sources:
            self._ticks += 1
            if self._ticks > self._patience_ticks:
                self.next_source(term)
