"""The faults that `tests/process` makes real, one kind at a time, in simulated clusters: what those tests then expect of processes."""

from __future__ import annotations

import pytest

from marble.testing.cluster import Simulation, simulate
from marble.testing.ledger import Violation
from marble.testing.plan import SCENARIOS

FAULT = {
    "partition": "cuts",
    "one-way": "one-way cuts",
    "partial-partition": "cuts",
    "no-majority": "cuts",
    "loss": "lost packets",
    "delay": None,
    "resets": "cut packets",
    "flipped-bits": "lost packets",
    "stopped": "pauses",
    "silent-peer": "pauses",
    "slow-disk": "slow syncs",
    "full-disk": "full disks",
}
"""What each must have done at least once."""

SEEDS = range(1, 4)
STEPS = 1500


def test_all_are_known() -> None:
    assert FAULT.keys() == SCENARIOS.keys()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_cluster_goes_on_and_comes_back(name: str) -> None:
    """Safe throughout (`simulate` raises otherwise); writes are acknowledged meanwhile, and two election timeouts after the end.

    Simulated time, so nothing here depends on this machine. A vote may be split once, so one history alone may take longer.
    """
    reports = [simulate(name, seed, STEPS) for seed in SEEDS]
    plan = SCENARIOS[name]
    timeout_us = plan.election_ticks * plan.tick_us
    for report in reports:
        assert report.undecided == 0
        assert 0 < report.back_us <= report.level_us
        assert report.acknowledged > 10
    # `simulate` has seen to it that the slowest came back within `Plan.back_timeouts`.
    assert sorted(report.back_us for report in reports)[len(reports) // 2] <= 2 * timeout_us
    fault = FAULT[name]
    assert fault is None or sum(report.injected.get(fault, 0) for report in reports) > 0


def test_a_cluster_that_does_not_come_back_soon_is_a_violation() -> None:
    """Here because a node that stood still goes on to do so: what was to wake it was lost with the fault's end."""
    simulation = Simulation(SCENARIOS["silent-peer"], 18)
    for node in simulation.nodes.values():
        node.resume = lambda: None  # type: ignore[method-assign]
    with pytest.raises(Violation, match="was committed within 2 election timeouts"):
        simulation.run(1200)
