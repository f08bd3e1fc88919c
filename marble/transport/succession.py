"""Which of several streams of one node is the one to listen to: the latest on which something has come.

Rule 1: what still comes on an older one, which TCP had held back while there was no way, is of the past: heartbeats of a leader, say, that
has given up meanwhile. It would keep others from electing another one.
Rule 2: a stream for control on which something has come makes older ones for entries old, too: who has opened it anew has given those up,
and, if it leads no more, will not open others that could take their place.
Rule 3: only who says that it has but one way to this node (`marble.transport.handshake.ONLY`) replaces its own streams.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

from marble.transport.codec import Hello, Lane
from marble.transport.handshake import ONLY


class Succession:
    """The streams of Raft messages that are open to one node. Thread-safe.

    - ``_latest`` has, for each sender and lane, the place of the latest stream on which something has come, while that is open.
    - Places are in the order in which `place` was entered. A sender opens streams for entries when it has had the answer to its hello on
      the one for control; so `place` is to be entered before that answer is given.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places = itertools.count(1)
        self._latest: dict[tuple[int, Lane], int] = {}

    @contextlib.contextmanager
    def place(self, hello: Hello) -> Iterator[Callable[[], bool]]:
        """While the stream that began with `hello` is open. What this gives is to be called for each of its packets, once it was found
        to be good: whether it is to be taken.
        """
        place, key = next(self._places), (hello.sender, hello.lane)
        lanes = {hello.lane, Lane.CONTROL} if hello.lane is Lane.LOG else {hello.lane}

        def newest() -> bool:
            with self._lock:
                newest = all(self._latest.get((hello.sender, lane), 0) <= place for lane in lanes)
                if newest and hello.features & ONLY:
                    self._latest[key] = place
                return newest

        try:
            yield newest
        finally:
            with self._lock:
                if self._latest.get(key) == place:
                    del self._latest[key]
