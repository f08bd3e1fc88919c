"""The slow and obvious twin of `marble.raft.progress`: nothing is counted along the way, everything is looked up in lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """A peer, by what was sent to it and what it said. The rules are those of etcd's ``tracker.Progress`` (v3.6).

    - ``sent``: (last index, bytes) of every message with entries since the peer was last streamed to.
    - ``acknowledged``: every index it ever said it has.
    """

    window: int
    window_bytes: int
    next_index: int
    state: str = "probe"
    sent: list[tuple[int, int]] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=lambda: [0])
    freed: list[int] = field(default_factory=lambda: [0])
    sent_commit: int = 0
    paused: bool = False
    pending_snapshot: int = 0

    @property
    def match_index(self) -> int:
        return max(self.acknowledged)

    @property
    def under_way(self) -> list[tuple[int, int]]:
        return [(last, size) for last, size in self.sent if last > max(self.freed)]

    @property
    def full(self) -> bool:
        return len(self.under_way) >= self.window or sum(size for _, size in self.under_way) >= self.window_bytes

    def become(self, state: str, snapshot: int = 0) -> None:
        # Only a probe may start behind a snapshot that perhaps arrived.
        known = max(self.match_index, self.pending_snapshot if state == "probe" else 0)
        self.state, self.next_index, self.pending_snapshot = state, known + 1, snapshot
        self.sent_commit = min(self.sent_commit, self.match_index)
        self.paused = False
        self.sent, self.freed = [], [0]

    def sent_entries(self, count: int, size: int) -> None:
        if self.state == "replicate":
            self.next_index += count
            if count:
                self.sent.append((self.next_index - 1, size))
            self.paused = self.full
        else:
            self.paused = self.paused or count > 0

    def free(self, index: int) -> None:
        self.freed.append(index)

    def maybe_update(self, index: int) -> bool:
        news = index > self.match_index
        self.acknowledged.append(index)
        if news:
            self.next_index = max(self.next_index, index + 1)
            self.paused = False
        return news

    def maybe_decrease(self, rejected: int, hint: int) -> bool:
        probed = self.next_index - 1
        if self.state == "replicate":
            if rejected <= self.match_index:
                return False
            self.next_index = self.match_index + 1
        else:
            if rejected != probed:
                return False
            # One back at least, to the hint if that is further, but what matches matches.
            self.next_index = max(min(probed - 1, hint), self.match_index) + 1
            self.paused = False
        self.sent_commit = min(self.sent_commit, self.match_index if self.state == "replicate" else self.next_index - 1)
        return True

    def looks(self) -> dict[str, Any]:
        """What must be equal to the fields of the real one."""
        return {
            "state": self.state,
            "match_index": self.match_index,
            "next_index": self.next_index,
            "sent_commit": self.sent_commit,
            "paused": self.paused,
            "pending_snapshot": self.pending_snapshot,
            "blocked": self.paused or self.state == "snapshot",
            "count": len(self.under_way),
            "bytes": sum(size for _, size in self.under_way),
            "full": self.full,
        }
