"""To whom a data directory belongs, on a disk that loses power in the middle of saying so."""

from __future__ import annotations

import pytest

from marble.env import SystemRandom
from marble.errors import CorruptionError, UsageError
from marble.identity import IDENTITY_FILE, bind
from marble.testing.disk import DiskCrash, SimulatedFiles


def disk(seed: int = 0) -> SimulatedFiles:
    return SimulatedFiles(SystemRandom(seed))


def test_a_directory_is_bound_at_first_use_and_for_good() -> None:
    files = disk()
    bind(files, "c", 1)
    bound = files.read(IDENTITY_FILE)
    bind(files, "c", 1)
    for cluster_id, node_id in (("c", 2), ("d", 1)):
        with pytest.raises(UsageError, match="choose another directory"):
            bind(files, cluster_id, node_id)
    assert files.read(IDENTITY_FILE) == bound


def test_who_votes_first_is_bound_too_and_no_configuration_changes_it() -> None:
    files = disk()
    assert bind(files, "c", 1, (1, 2, 3)) == (1, 2, 3)
    assert bind(files, "c", 1, (1, 2, 3, 4)) == (1, 2, 3)
    waiting = disk()
    assert bind(waiting, "c", 4) == ()
    assert bind(waiting, "c", 4, (1, 2, 3, 4)) == ()


def test_an_identity_without_voters_is_damage() -> None:
    files = disk()
    files.put(IDENTITY_FILE, b'{"format": 1, "cluster_id": "c", "node_id": 1}')
    with pytest.raises(CorruptionError, match="first voters"):
        bind(files, "c", 1, (1,))


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff\xfe\xfd"])
def test_an_identity_that_cannot_be_read_is_damage(damaged: bytes) -> None:
    files = disk()
    files.put(IDENTITY_FILE, damaged)
    with pytest.raises(CorruptionError, match="cannot be read") as caught:
        bind(files, "c", 1)
    assert caught.value.path == "simulated:" + IDENTITY_FILE
    assert files.read(IDENTITY_FILE) == damaged


def test_an_identity_that_is_no_object_belongs_to_somebody_else() -> None:
    files = disk()
    files.put(IDENTITY_FILE, b"7")
    with pytest.raises(UsageError, match="belongs to 7"):
        bind(files, "c", 1)


@pytest.mark.parametrize("seed", range(5))
def test_power_lost_at_every_operation_leaves_the_directory_unbound_or_bound_whole(seed: int) -> None:
    # 1 create, 2 write, 3 sync, 4 rename, 5 sync of the directory; the next operation is not ours.
    for operation in range(1, 6):
        files = disk(seed)
        files.lose_power_at = operation
        with pytest.raises(DiskCrash):
            bind(files, "c", 1)
        files.crash()
        bind(files, "c", 1)
        with pytest.raises(UsageError):
            bind(files, "c", 2)


def test_what_a_killed_process_left_unfinished_is_made_anew() -> None:
    files = disk()
    files.put(IDENTITY_FILE + ".tmp", b'{"form')
    bind(files, "c", 1)
    assert files.list("") == [IDENTITY_FILE]
    bind(files, "c", 1)
