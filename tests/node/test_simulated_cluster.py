"""The production core, driver, log and tables under simulated faults: safety always, and progress once the faults end."""

from __future__ import annotations

import os

import pytest

from marble.errors import MarbleError
from marble.logstore.log import Log
from marble.testing import cluster
from marble.testing.cluster import Faults, run

STEPS = 1200
CRASHES = Faults(crash=0.01, restart=0.1, partition=0.005)
BAD_NETWORK = Faults(loss=0.2, duplication=0.1, delay_steps_max=60, tick=0.3)
FRESH_SEED = int(os.environ.get("MARBLE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")


@pytest.mark.parametrize("faults", [CRASHES, BAD_NETWORK], ids=["crashes", "bad-network"])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("seed", range(1, 5))
def test_fixed_seeds(seed: int, size: int, faults: Faults) -> None:
    history = run(seed, STEPS, size, faults)
    assert history.committed


@pytest.mark.parametrize("offset", range(4))
def test_fresh_seeds(offset: int) -> None:
    print(f"seed {FRESH_SEED}: repeat with MARBLE_TEST_SEED={FRESH_SEED}")
    run(FRESH_SEED + offset, STEPS, 3, CRASHES if offset % 2 else BAD_NETWORK)


def test_one_seed_gives_one_history() -> None:
    first, second = run(7, STEPS, 3, CRASHES), run(7, STEPS, 3, CRASHES)
    assert first.committed == second.committed
    assert first.acknowledged == second.acknowledged
    assert first.leaders == second.leaders
    assert [node.files.operations for node in first.nodes.values()] == [
        node.files.operations for node in second.nodes.values()
    ]


def run_many() -> None:
    for seed in range(1, 20):
        run(seed, STEPS, 3, CRASHES)


def test_acknowledging_before_the_sync_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(drivers: list, log: Log) -> None:
        busy = True
        while busy:
            numbers = [driver.begin() for driver in drivers if driver.has_ready()]
            for driver, number in zip(drivers, numbers, strict=False):
                driver.persisted(number)
            if any(numbers):
                log.sync()
            busy = bool(numbers)
            for driver in drivers:
                while (job := driver.take_apply()) is not None:
                    job.run()
                    driver.finish_apply(job)
                    busy = True

    monkeypatch.setattr(cluster, "turn", turn)
    with pytest.raises((MarbleError, AssertionError)):
        run_many()


def test_forgetting_term_and_vote_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    append = Log.append

    def forget(self: Log, group: int, hard_state: object, entries: object) -> None:
        if entries is not None:
            append(self, group, None, entries)

    monkeypatch.setattr(Log, "append", forget)
    with pytest.raises((MarbleError, AssertionError)):
        run_many()
