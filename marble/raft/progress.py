"""What a leader knows of a peer's log, and how much it may have under way to it.

Rule 1: the transitions of flow control happen here; `leader` says when. Field by field etcd/raft's ``tracker.Progress``
(v3.6).
"""

from __future__ import annotations

import enum
from collections import deque


class ProgressState(enum.Enum):
    """How the leader feeds a peer.

    PROBE: it does not know where the logs part: one message at a time, then wait for an answer or a heartbeat response.
    REPLICATE: it does: messages are pipelined up to the in-flight window.
    SNAPSHOT: the peer needs entries that are gone here, and was sent a snapshot: nothing more goes until it has it.
    """

    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class Inflights:
    """The window of APPEND_ENTRIES messages sent in REPLICATE and not yet answered.

    - Their last indexes ascend strictly.
    - ``count <= messages_max``; ``bytes`` may pass ``bytes_max`` by one message, after which the window is full.
    """

    __slots__ = ("_messages", "_messages_max", "bytes", "bytes_max")

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        self._messages: deque[tuple[int, int]] = deque()
        self._messages_max = messages_max
        self.bytes_max = bytes_max
        self.bytes = 0

    @property
    def count(self) -> int:
        """Messages under way."""
        return len(self._messages)

    @property
    def full(self) -> bool:
        """Whether nothing more may be sent for now."""
        return len(self._messages) >= self._messages_max or self.bytes >= self.bytes_max

    def add(self, last_index: int, size: int) -> None:
        """A message whose last entry is `last_index` went out with `size` bytes of entries."""
        self._messages.append((last_index, size))
        self.bytes += size

    def free(self, index: int) -> None:
        """The peer has everything up to `index`: forget messages that end at or before it."""
        while self._messages and self._messages[0][0] <= index:
            self.bytes -= self._messages.popleft()[1]

    def clear(self) -> None:
        """Forget all: what was under way may be lost."""
        self._messages.clear()
        self.bytes = 0


class Progress:
    """One peer as its leader sees it.

    - ``0 <= match_index < next_index``.
    - ``match_index`` only rises while this leader leads; the entries up to it are durable at the peer.
    - In REPLICATE the entries ``(match_index, next_index)`` are under way.
    - ``pending_snapshot`` is not 0 exactly in SNAPSHOT: the index of the snapshot under way.
    """

    __slots__ = (
        "inflights",
        "match_index",
        "next_index",
        "paused",
        "pending_snapshot",
        "recent_active",
        "sent_commit",
        "state",
    )

    def __init__(self, next_index: int, inflights: Inflights) -> None:
        # The last index up to which the peer's log is known to equal the leader's.
        self.match_index = 0
        # The first entry of the next message.
        self.next_index = next_index
        # The last commit index sent; spares messages that could not tell the peer anything new.
        self.sent_commit = 0
        self.state = ProgressState.PROBE
        self.pending_snapshot = 0
        # Whether the peer said anything since the last check of the quorum.
        self.recent_active = False
        # PROBE: a probe is out. REPLICATE: the window was full at the last message. An answer or a heartbeat response
        # lifts it.
        self.paused = False
        self.inflights = inflights

    def become_probe(self) -> None:
        """Go back to asking: what was under way counts as lost, but for a snapshot, which may have arrived."""
        pending = self.pending_snapshot
        self._reset(ProgressState.PROBE)
        self.next_index = max(self.match_index, pending) + 1

    def become_replicate(self) -> None:
        """The logs are known to agree at ``match_index``: stream from there."""
        self._reset(ProgressState.REPLICATE)

    def become_snapshot(self, index: int) -> None:
        """The snapshot at `index` is on its way."""
        self._reset(ProgressState.SNAPSHOT)
        self.pending_snapshot = index

    @property
    def blocked(self) -> bool:
        """Whether no append may go to the peer now."""
        return self.paused or self.state is ProgressState.SNAPSHOT

    def _reset(self, state: ProgressState) -> None:
        self.state = state
        self.paused = False
        self.pending_snapshot = 0
        self.inflights.clear()
        self.next_index = self.match_index + 1
        self.sent_commit = min(self.sent_commit, self.match_index)

    def sent_entries(self, count: int, size: int) -> None:
        """A message with `count` entries of `size` bytes from ``next_index`` on went out."""
        if self.state is ProgressState.REPLICATE:
            if count:
                self.next_index += count
                self.inflights.add(self.next_index - 1, size)
            self.paused = self.inflights.full
        elif count:
            self.paused = True

    def can_bump_commit(self, commit: int) -> bool:
        """Whether a message with `commit` could raise the peer's commit index."""
        return commit > self.sent_commit and self.sent_commit < self.next_index - 1

    def maybe_update(self, index: int) -> bool:
        """The peer holds everything up to `index`. False if that is old news."""
        if index <= self.match_index:
            return False
        self.match_index = index
        self.next_index = max(self.next_index, index + 1)
        self.paused = False
        return True

    def maybe_decrease(self, rejected: int, hint: int) -> bool:
        """The peer refused entries after `rejected` and may match at `hint`. False if the refusal is stale."""
        if self.state is ProgressState.REPLICATE:
            if rejected <= self.match_index:
                return False
            self.next_index = self.match_index + 1
            self.sent_commit = min(self.sent_commit, self.match_index)
            return True
        # A probe is refused at exactly the index that it asked for; anything else answers an older probe.
        if self.next_index - 1 != rejected:
            return False
        self.next_index = max(min(rejected, hint + 1), self.match_index + 1)
        self.sent_commit = min(self.sent_commit, self.next_index - 1)
        self.paused = False
        return True

    def __repr__(self) -> str:
        text = f"{self.state.value} match={self.match_index} next={self.next_index}"
        if self.pending_snapshot:
            text += f" snapshot={self.pending_snapshot}"
        if self.paused:
            text += " paused"
        if not self.recent_active:
            text += " inactive"
        if self.inflights.count:
            text += f" inflight={self.inflights.count}" + ("[full]" if self.inflights.full else "")
        return text
