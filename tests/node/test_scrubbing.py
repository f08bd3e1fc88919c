"""Files of tables are read through and checked now and then, and what is damaged is found before anybody needs it."""

from __future__ import annotations

import pytest
from node.ring import Ring, expected
from node.test_healing import stored_ring, table_paths

from marble.compacting import SCRUBS_MIN, Compactor
from marble.config import RaftClusterConfig
from marble.errors import UnavailableError, UsageError
from marble.jobs import ScrubJob
from marble.options import NodeOptions


def scrub(compactor: Compactor, ticks: int) -> list[ScrubJob]:
    """What is checked in so many ticks."""
    jobs = []
    for _ in range(ticks):
        compactor.tick()
        job = compactor.take_job()
        if job is not None:
            assert isinstance(job, ScrubJob)
            assert compactor.take_job() is None, "one at a time"
            job.run()
            compactor.finish_job(job)
            jobs.append(job)
    return jobs


def compacter(ring: Ring, number: int, scrub_ticks: int, **more: object) -> Compactor:
    machine = ring[number].machines[0]
    while machine.compact():
        continue
    return Compactor(0, machine, more.get("pace"), scrub_ticks)  # type: ignore[arg-type]


def test_each_file_is_checked_once_a_round() -> None:
    ring = stored_ring(110)
    compactor = compacter(ring, 2, 16 * 20)
    names = {path[-38:-6] for path in table_paths(ring, 2)}
    assert names
    jobs = scrub(compactor, 20 * (len(names) + 1))
    assert [job.name for job in jobs] == [*sorted(names), ""]
    assert compactor.scrubbed == len(names)
    assert all(job.damage is None and job.error is None for job in jobs)
    # And from the beginning again.
    assert scrub(compactor, 20)[0].name == min(names)


def test_a_round_takes_its_time_however_many_files_there_are() -> None:
    ring = stored_ring(110)
    compactor = compacter(ring, 2, SCRUBS_MIN * 1000)
    assert scrub(compactor, 999) == []
    assert len(scrub(compactor, 1)) == 1
    assert scrub(compactor, 999) == []


def test_what_is_damaged_is_found_reported_and_healed() -> None:
    ring = stored_ring(50)
    machine = ring[2].machines[0]
    compactor = compacter(ring, 2, 16)
    paths = table_paths(ring, 2)
    for path in paths:
        ring[2].files.flip_bit(path, 8 * 700)
    assert machine.damaged() == []
    jobs = [job for job in scrub(compactor, 20) if job.damage is not None]
    assert {path.split("-")[1][:32] for path in paths} == {job.name for job in jobs}
    assert all(job.name in str(job.damage) for job in jobs)
    assert len(machine.damaged()) == len(paths)
    ring.tick(60)
    assert machine.damaged() == []
    assert ring[2].rows() == expected(50)
    assert not any(job.damage for job in scrub(compacter(ring, 2, 16), 20))


def test_a_file_that_went_meanwhile_is_no_damage() -> None:
    ring = stored_ring(50)
    machine = ring[2].machines[0]
    for path in table_paths(ring, 2):
        ring[2].files.delete(path)
    trees = machine._all_trees
    calls = iter([trees(), []])
    machine._all_trees = lambda: next(calls)  # type: ignore[method-assign]
    assert machine.scrub("")[2] is None
    assert machine.store is not None
    assert machine.store.damaged == {}


def test_checking_is_paced_and_gives_up_with_the_node() -> None:
    ring = stored_ring(50)
    seen: list[int] = []
    (job, *_) = scrub(compacter(ring, 2, 16, pace=seen.append), 1)
    assert job.error is None
    assert sum(seen) == ring[2].files.size(f"tables/00000000-{job.name}.arrow")

    def stop(nbytes: int) -> None:
        raise UnavailableError("the node stops")

    (job, *_) = scrub(compacter(ring, 2, 16, pace=stop), 1)
    assert isinstance(job.error, UnavailableError)
    assert ring[2].machines[0].damaged() == []


def test_nothing_is_checked_where_it_is_off_or_there_is_nothing() -> None:
    assert scrub(compacter(stored_ring(50), 2, 0), 100) == []
    jobs = scrub(compacter(stored_ring(3), 2, 16), 5)
    assert {job.name for job in jobs} == {""}
    assert RaftClusterConfig("c", ["h:1"], scrub_interval_s=0).scrub_interval_s == 0
    assert NodeOptions.scrub_interval_s is not None
    with pytest.raises(UsageError, match="scrub_interval_s"):
        RaftClusterConfig("c", ["h:1"], scrub_interval_s=-1)
