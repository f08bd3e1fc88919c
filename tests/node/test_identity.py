"""To whom a data directory belongs, and whose the others are, on a disk that loses power in the middle of saying so."""

from __future__ import annotations

import json
import logging

import pytest

from marble.env import SystemRandom
from marble.errors import CorruptionError, InvariantError, ProtocolError, UsageError
from marble.identity import ACQUAINTANCES_FILE, ACQUAINTANCES_MAX, IDENTITY_FILE, Acquaintances, bind
from marble.metrics import Metrics
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
    assert bind(files, "c", 1, (1, 2, 3)).voters == (1, 2, 3)
    assert bind(files, "c", 1, (1, 2, 3, 4)).voters == (1, 2, 3)
    waiting = disk()
    assert bind(waiting, "c", 4).voters == ()
    assert bind(waiting, "c", 4, (1, 2, 3, 4)).voters == ()


def test_each_directory_is_another_incarnation_and_stays_it() -> None:
    one, other = disk(), disk()
    first = bind(one, "c", 1).incarnation
    assert 1 <= first < 2**64
    assert bind(one, "c", 1).incarnation == first
    assert bind(other, "c", 1).incarnation != first
    assert json.loads(one.read(IDENTITY_FILE))["incarnation"] == f"{first:016x}"


@pytest.mark.parametrize("wrong", [None, 7, "7", "0" * 16, "x" * 16, "0x" + "1" * 14, "F" * 16])
def test_an_identity_without_an_incarnation_is_damage(wrong: object) -> None:
    files = disk()
    identity = {"format": 1, "cluster_id": "c", "node_id": 1, "voters": [1]}
    files.put(IDENTITY_FILE, json.dumps(identity if wrong is None else {**identity, "incarnation": wrong}).encode())
    with pytest.raises(CorruptionError, match="which incarnation"):
        bind(files, "c", 1, (1,))


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


def acquaintances(files: SimulatedFiles, metrics: Metrics | None = None) -> Acquaintances:
    return Acquaintances(files, 99, metrics or Metrics())


def test_a_node_is_known_by_the_directory_with_which_it_was_met_first() -> None:
    files, metrics = disk(), Metrics()
    for known in (acquaintances(files, metrics), acquaintances(files, metrics)):
        known.meet(2, 2**64 - 1)
        known.meet(3, 1)
        with pytest.raises(
            ProtocolError, match=r"directory of node 2 was replaced.* under a new id \(`marble members`\)"
        ):
            known.meet(2, 5)
        known.meet(2, 2**64 - 1)
    assert metrics.counter("transport_incarnations_refused").value == 2
    with pytest.raises(ProtocolError, match="node 4 does not say"):
        known.meet(4, 0)
    # Another disk is another node's memory, or that of a cluster that is new as a whole.
    acquaintances(disk()).meet(2, 5)


def test_a_replaced_directory_is_logged_once_each(caplog: pytest.LogCaptureFixture) -> None:
    known = acquaintances(disk())
    known.meet(2, 1)
    with caplog.at_level(logging.ERROR, "marble.identity"):
        for incarnation in (5, 5, 6, 6):
            with pytest.raises(ProtocolError):
                known.meet(2, incarnation)
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == [
        f"it was {1:016x} and is {new:016x}" for new in (5, 6)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_who_was_let_pass_is_known_after_any_crash(seed: int) -> None:
    # Two nodes are met: 5 operations for the first, as in `bind`, and 5 for the second.
    for operation in range(1, 12):
        files = disk(seed)
        files.lose_power_at = operation
        passed: list[int] = []
        try:
            known = acquaintances(files)
            for node in (2, 3):
                known.meet(node, node)
                passed.append(node)
        except DiskCrash:
            assert operation <= 10
        else:
            assert operation == 11
            files.lose_power_at = None
        files.crash()
        known = acquaintances(files)
        for node in passed:
            with pytest.raises(ProtocolError, match="replaced"):
                known.meet(node, 77)
        for node in (2, 3):
            known.meet(node, node)


def test_a_disk_that_fails_lets_nobody_pass_from_then_on() -> None:
    files = disk()
    known = acquaintances(files)
    known.meet(2, 2)
    files.create = _fail  # type: ignore[method-assign]
    with pytest.raises(InvariantError, match=r"acquaintances\.json cannot be written: .*no sync"):
        known.meet(3, 3)
    del files.create  # type: ignore[method-assign]
    # The disk is well again, and what it has lost meanwhile nobody knows.
    with pytest.raises(InvariantError, match="failed before"):
        known.meet(3, 3)
    known.meet(2, 2)


def _fail(path: str) -> None:
    raise OSError("no sync")


def test_strangers_with_invented_ids_fill_a_bounded_file() -> None:
    files = disk()
    known = acquaintances(files)
    known._met = dict.fromkeys(range(2, ACQUAINTANCES_MAX + 1), 1)
    known.meet(ACQUAINTANCES_MAX + 1, 1)
    with pytest.raises(ProtocolError, match="one more than"):
        known.meet(ACQUAINTANCES_MAX + 2, 1)
    known.meet(2, 1)
    acquaintances(files).meet(2, 1)


@pytest.mark.parametrize(
    "damaged", [b"", b"7", b"{}", b'{"met": 5, "checksum": ""}', b'{"met": {"2": 5}, "checksum": ""}']
)
def test_damage_to_what_is_known_of_others_is_found(damaged: bytes) -> None:
    files = disk()
    files.put(ACQUAINTANCES_FILE, damaged)
    with pytest.raises(CorruptionError, match=r"cannot be read|is damaged"):
        acquaintances(files)


def test_a_changed_digit_in_what_is_known_of_others_is_found() -> None:
    files = disk()
    acquaintances(files).meet(2, 0xABC)
    files.put(ACQUAINTANCES_FILE, files.read(ACQUAINTANCES_FILE).replace(b"abc", b"abd"))
    with pytest.raises(CorruptionError, match=r"cannot be read|is damaged"):
        acquaintances(files)
