"""What everything in one history shares: time, chance, the plan, the witness's ledgers, and the cores that live.

Rule 1: a part of the simulation reaches another only through here or through what it was given; so each can be read alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from marble.raft.core import Raft
from marble.testing.ledger import Ledger
from marble.testing.loop import Loop
from marble.testing.model import Model
from marble.testing.plan import Plan
from marble.transport.codec import Envelope


@dataclass(slots=True)
class World:
    """See the head of this module.

    Attributes
    ----------
    plan
        Replaced by its healed twin when the faults end.
    injected
        Faults so far, by kind.
    cores
        Group -> node -> the core that runs there now.
    models
        Group -> what its tables must hold, where they are in files.
    send
        Puts a packet of messages on the network: (from, to, messages).
    """

    loop: Loop
    plan: Plan
    injected: Counter[str] = field(default_factory=Counter)
    ledgers: dict[int, Ledger] = field(default_factory=dict)
    cores: dict[int, dict[int, Raft]] = field(default_factory=dict)
    models: dict[int, Model] = field(default_factory=dict)
    send: Callable[[int, int, list[Envelope]], bool] = lambda sender, to, envelopes: True
