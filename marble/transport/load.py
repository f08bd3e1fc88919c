"""What a pump sends, and what more is said on its stream: the two sides that `marble.transport.pump` leaves open.

Rule 1: nothing but interfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from marble.transport.codec import Packet


class Load(Protocol):
    """What a pump sends. `accept`, `wake` and whatever fills it are thread-safe; the rest is the pump's."""

    def accept(self) -> None:
        """Take messages from now on; so it is at first, until `give_up`."""
        ...

    def refuse(self) -> None:
        """Take no more, for good."""
        ...

    def wake(self) -> None:
        """Let a `take` that waits return."""
        ...

    def take(self, timeout_s: float) -> bool:
        """Gather what is to be written next, unless something taken before is not written yet; whether there is anything."""
        ...

    def packets(self, features: int) -> Iterable[Packet]:
        """What was taken, for a peer that understands `features`; one empty packet if that is nothing."""
        ...

    def written(self, seconds: float) -> None:
        """All that was taken has been written; for so long the stream had to be waited for."""
        ...

    def give_up(self) -> int:
        """Drop everything, and take no more until `accept`; how many messages that were."""
        ...


class Dialogue(Protocol):
    """What is said on a stream beside what a load gives, where both ends know of it (`marble.transport.sharing`).

    `heard` is called on a thread of the stream's, the rest on the pump's.
    """

    def begin(self) -> Packet | None:
        """A stream stands: what to write first."""
        ...

    def replace(self, packet: Packet, going_on: Callable[[], bool]) -> Packet:
        """What to write in the place of `packet`. May wait for as long as `going_on`."""
        ...

    def wrote(self, packet: Packet, seconds: float) -> None:
        """`packet` was written as it is, and the stream had to be waited for so long."""
        ...

    def heard(self, answer: bytes) -> None:
        """The peer answers. Raises ProtocolError if it could not say that."""
        ...

    def ending(self) -> Packet:
        """What to write last: the peer ends the stream when it has taken all that came before."""
        ...

    def end(self) -> None:
        """The stream is gone. Idempotent."""
        ...
