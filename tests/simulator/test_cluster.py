"""The production core, driver, log and tables under simulated faults: safety always, and progress once the faults end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from marble.testing.cluster import Report, Simulation, simulate
from marble.testing.plan import PLANS, SWARM, SWARM_FILES, plan_for

STEPS = 3000
FRESH_SEED = int(os.environ.get("MARBLE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("plan", PLANS)
def test_fixed_seeds(plan: str, seed: int) -> None:
    report = simulate(plan, seed, STEPS)
    assert report.committed > 10
    assert report.acknowledged > 10
    assert report.undecided == 0


@pytest.mark.parametrize("offset", range(10))
def test_fresh_seeds(offset: int) -> None:
    print(f"repeat with MARBLE_TEST_SEED={FRESH_SEED}")
    simulate(SWARM, FRESH_SEED + offset, STEPS)


@pytest.mark.parametrize("offset", range(4))
def test_fresh_seeds_with_tables_in_files(offset: int) -> None:
    print(f"repeat with MARBLE_TEST_SEED={FRESH_SEED}")
    simulate(SWARM_FILES, FRESH_SEED + offset, STEPS)


def test_every_fault_of_the_plans_happens() -> None:
    injected: set[str] = set()
    for plan in PLANS:
        # Lost disks and crashes within a backup are rare: the others must be able to do without.
        for seed in range(1, 13 if plan in ("members", "damage", "backups") else 3):
            injected.update(simulate(plan, seed, STEPS).injected)
    assert {
        "blackouts", "clock jumps", "cuts", "cut packets", "elections out of turn", "failed disk operations", "flapping cuts",
        "full disks", "kills", "late packets", "lost answers", "lost packets", "lost requests", "one-way cuts", "pauses",
        "power losses", "repeated packets", "slow syncs", "lags", "transfers", "wiped disks", "new nodes",
        "membership changes asked for", "snapshots taken", "snapshots installed", "purges",
        "compactions", "damaged files", "failed reads", "healed files", "lost files", "reads of damaged files", "logs at rest",
        "backups", "backups restored", "backups interrupted", "broken streams", "lost ways",
    } <= injected  # fmt: skip


def history(plan: str, seed: int) -> tuple[Report, str]:
    simulation = Simulation(plan_for(plan, seed), seed, record=True)
    return simulation.run(STEPS), simulation.loop.digest()


@pytest.mark.parametrize("plan", ["mixed", "crashes", "damage"])
def test_one_seed_gives_one_history_to_the_byte(plan: str) -> None:
    # Another process with another hash seed: neither the order of a set nor an address may leave a trace.
    code = f"from simulator.test_cluster import history; print(history({plan!r}, 7))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == repr(history(plan, 7))
    assert history(plan, 8)[1] != history(plan, 7)[1]
