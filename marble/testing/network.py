"""The network between simulated nodes: it delays, loses, repeats, reorders and cuts, and never invents.

Rule 1: what arrives was sent. A packet is the messages that a driver hands to the transport at once; they stay together
        and in order, unless the plan splits them.
Rule 2: a cut is of one direction between two nodes. It takes what is under way, too: whether a packet passes is asked when it arrives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from marble.testing.loop import SECOND, Loop
from marble.testing.plan import NetworkFaults
from marble.transport.codec import Envelope

Deliver = Callable[[int, Sequence[Envelope]], None]
Tell = Callable[[int, int, bool], None]


LOST_US = SECOND // 5
"""So long after a packet was lost who sent it hears of it, at most."""


class Network:
    """Links between all nodes.

    Parameters
    ----------
    loop
        Time and chance.
    faults
        How bad it is; may be replaced at any time.
    deliver
        Takes the number of the receiver and what arrives there.
    tell
        Takes the numbers of a sender and of whom it wrote to in vain, and whether there is another way, as far as is known.
    injected
        Where faults are counted, by kind.
    """

    def __init__(self, loop: Loop, faults: NetworkFaults, deliver: Deliver, tell: Tell, injected: Counter[str]) -> None:
        self.faults = faults
        self._loop = loop
        self._deliver = deliver
        self._tell = tell
        self._injected = injected
        self._cuts: Counter[tuple[int, int]] = Counter()
        """(from, to) -> how many cuts lie on this way at the moment."""
        self._lags: dict[int, int] = {}
        """What goes to a node (or, if its number is negative, comes from it) -> how much later it arrives."""
        self._healings = 0

    def send(self, sender: int, to: int, envelopes: list[Envelope]) -> bool:
        """Put a packet on its way. Always True: whether it arrives, the sender will see."""
        faults, loop = self.faults, self._loop
        if loop.chance(faults.split) and len(envelopes) > 1:
            for envelope in envelopes:
                self._carry(sender, to, [envelope])
        else:
            self._carry(sender, to, envelopes)
        return True

    def cut(self, nodes: Sequence[int], around: Sequence[int] = ()) -> None:
        """Cut some links of these nodes for a while, `around` some of them if any are given: wholly or partly, both ways or one."""
        loop, faults = self._loop, self.faults
        if len(nodes) < 2:
            return
        inside = (
            list(around) or [node for node in nodes if loop.chance(0.4)] or [nodes[loop.between(0, len(nodes) - 1)]]
        )
        partial = loop.chance(faults.partial)
        ways = loop.between(0, 3)
        if faults.ways != "any":
            ways = 0 if faults.ways == "both" else 1 + ways % 2
        links = []
        for one in inside:
            for other in nodes:
                if other in inside or (partial and loop.chance(0.5)):
                    continue
                if ways != 1:
                    links.append((one, other))
                if ways != 2:
                    links.append((other, one))
        if not links:
            return
        duration = loop.between(1000, faults.cut_us)
        self._injected["cuts" if ways in (0, 3) else "one-way cuts"] += 1
        flaps = loop.between(2, 12) if loop.chance(faults.flap) else 0
        if flaps:
            self._injected["flapping cuts"] += 1
        loop.note(0, "network: cut {} for {} us, {} flaps", links, duration, flaps)
        self._close(links, duration, flaps, self._healings)

    def lag(self, nodes: Sequence[int], around: Sequence[int] = ()) -> None:
        """Let all that one of these nodes is sent, or all that it sends, come late for a while, and perhaps cut it off at the end."""
        loop = self._loop
        node = loop.random.choice(list(around or nodes))
        key = node if loop.chance(0.7) else -node
        self._lags[key] = loop.between(self.faults.lag_us // 4, self.faults.lag_us)
        duration = loop.between(SECOND, 5 * SECOND)
        self._injected["lags"] += 1
        loop.note(0, "network: node {} {} late for {} us", node, "hears" if key > 0 else "is heard", duration)
        if loop.chance(0.5):
            links = [(node, other) for other in nodes if other != node]
            loop.after(duration // 3, self._close, links, duration, 0, self._healings)
        loop.after(duration, self._end_lag, key)

    def _end_lag(self, key: int) -> None:
        self._lags.pop(key, None)

    def heal(self) -> None:
        """Open all links, for good as far as the cuts so far go."""
        self._healings += 1
        self._cuts.clear()
        self._lags.clear()

    def _close(self, links: list[tuple[int, int]], duration: int, flaps: int, healing: int) -> None:
        if healing == self._healings:
            self._cuts.update(links)
            self._loop.after(duration // (flaps + 1), self._open, links, duration, flaps, healing)

    def _open(self, links: list[tuple[int, int]], duration: int, flaps: int, healing: int) -> None:
        if healing != self._healings:
            return
        for link in links:
            self._cuts[link] -= 1
            if not self._cuts[link]:
                del self._cuts[link]
        if flaps:
            self._loop.after(duration // (flaps + 1), self._close, links, duration, flaps - 1, healing)

    def _carry(self, sender: int, to: int, envelopes: list[Envelope]) -> None:
        faults, loop = self.faults, self._loop
        if loop.chance(faults.loss):
            self._injected["lost packets"] += 1
            self._break(sender, to)
            return
        copies = 1
        if loop.chance(faults.duplication):
            self._injected["repeated packets"] += 1
            copies = 2
        for _ in range(copies):
            longest = faults.delay_us
            if loop.chance(faults.slow):
                self._injected["late packets"] += 1
                longest = faults.slow_us
            late = self._lags.get(to, 0) + self._lags.get(-sender, 0) if self._lags else 0
            loop.after(50 + late + int(loop.random.random() * longest), self._arrive, sender, to, envelopes)

    def _arrive(self, sender: int, to: int, envelopes: list[Envelope]) -> None:
        if self._cuts and (sender, to) in self._cuts:
            self._injected["cut packets"] += 1
            self._break(sender, to)
            return
        self._deliver(to, envelopes)

    def _break(self, sender: int, to: int) -> None:
        loop = self._loop
        if loop.chance(self.faults.told):
            another = loop.chance(0.5)
            self._injected["lost ways" if another else "broken streams"] += 1
            loop.after(loop.between(0, LOST_US), self._tell, sender, to, another)
