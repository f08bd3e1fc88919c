"""What everything in one history shares: time, chance, the plan, the witness's ledgers, and the cores that live.

Rule 1: a part of the simulation reaches another only through here or through what it was given; so each can be read alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from marble.raft.config import RaftConfig
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

    def core_config(self, node: int) -> RaftConfig:
        """How the cores of `node` behave."""
        plan = self.plan
        return RaftConfig(
            id=node,
            election_ticks=plan.election_ticks,
            heartbeat_ticks=plan.heartbeat_ticks,
            election_spread_ticks=plan.election_spread_ticks,
            append_bytes_max=1 if self.loop.chance(plan.one_by_one) else 4096,
            pre_vote=plan.pre_vote,
            check_quorum=plan.check_quorum,
            lease_reads=plan.lease_reads,
            tick_us=plan.tick_us,
            clock_drift=plan.clock_drift_allowed,
            quiesce_ticks=plan.quiesce_ticks,
            priority=node % 3 if plan.priorities else 0,
            random=self.loop.random,
        )
