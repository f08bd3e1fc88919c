"""Messages on their way out, and what each must wait for.

Rule 1: a message leaves only when everything that it asserts about this node is durable here.

A message is put by `State.send` into one of two queues:

- ``now``: it asserts nothing that a crash here could take back (a leader's APPEND_ENTRIES asserts what the leader
  *wants*);
- ``after``: it asserts this node's log, vote or term as they are in memory at this moment.

`take` runs when a Ready hands out all that is not yet announced for persisting. So the ``after`` messages of that
moment depend on the writes of this Ready and of earlier ones, and on nothing else. Three cases:

1. the Ready persists something (it has a number): the messages go with it, to be sent after its sync;
2. it persists nothing, and no earlier write is under way: they depend on nothing more and go with it, to be sent at
   once;
3. it persists nothing, but an earlier write is under way: they stay here until that write is reported, since the driver
   is free to send the messages of such a Ready at once.
"""

from __future__ import annotations

from collections import deque

from marble.raft.messages import Message
from marble.types import INDEX_MAX


class Outbox:
    """The queues. `_held` is ordered by the number of the write that its messages wait for."""

    __slots__ = ("_after", "_held", "_now")

    def __init__(self) -> None:
        self._now: list[Message] = []
        self._after: list[Message] = []
        self._held: deque[tuple[int, Message]] = deque()

    def put(self, message: Message, asserts_memory: bool) -> None:
        """Queue `message`; `asserts_memory` says that it must wait for what is in memory to become durable."""
        (self._after if asserts_memory else self._now).append(message)

    def drop_appends(self, end: int = INDEX_MAX) -> list[int]:
        """Forget APPEND_ENTRIES that no Ready has carried and that bring entries before `end`: these are no longer this
        node's to send. Returns the peers that miss something now.
        """
        dropped = [message for message in self._now if message.entries is not None and message.entries.first < end]
        self._now = [message for message in self._now if message not in dropped]
        return [message.to for message in dropped]

    @property
    def waiting(self) -> bool:
        """Whether `take` could hand out anything, or has something to hold back."""
        return bool(self._now or self._after)

    def take(self, number: int, unfinished: int) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """The messages to send now, and those to send after persisting.

        Parameters
        ----------
        number
            Number of the Ready that takes them; 0 if it persists nothing.
        unfinished
            Number of the last write that was handed out and not yet reported; 0 if there is none.
        """
        now, self._now = tuple(self._now), []
        after, self._after = tuple(self._after), []
        if not number and unfinished:
            self._held.extend((unfinished, message) for message in after)
            after = ()
        return now, after

    def persisted(self, number: int) -> None:
        """Writes up to `number` are durable: messages that waited for them may go."""
        while self._held and self._held[0][0] <= number:
            self._now.append(self._held.popleft()[1])
