"""Every byte of a data directory is under a checksum: ``marble verify`` finds each one that is flipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from logstore.support import disk
from node.file_machine import FileMachine
from node.ring import Ring

from marble.checkpoint import write_checkpoint
from marble.env import SystemFiles
from marble.errors import CorruptionError
from marble.identity import IDENTITY_FILE, seal
from marble.snapshotting import SnapshotPolicy
from marble.testing.disk import SimulatedFiles
from marble.verify import Verified, verify


class Below(SimulatedFiles):
    """A directory of another simulated disk, as a disk of its own."""

    @classmethod
    def of(cls, files: SimulatedFiles, directory: str) -> SimulatedFiles:
        found = disk()
        for path in list(files._names):
            if path.startswith(f"{directory}/"):
                found.put(path.removeprefix(f"{directory}/"), files.read(path))
        return found


def small_directory() -> tuple[SimulatedFiles, SimulatedFiles]:
    """A node's directory with a log of two segments, a snapshot and files, and a checkpoint of it."""
    ring = Ring(1, machine=FileMachine, policy=SnapshotPolicy(distance=6, tail=1))
    ring.create()
    ring.write(5)
    peer = ring[1]
    peer.files.put(IDENTITY_FILE, seal({"format": 1, "cluster_id": "ring", "node_id": 1, "voters": [1]}))
    write_checkpoint(peer.files, peer.log, list(peer.stores.values()), "copy")
    peer.log.close()
    copy = Below.of(peer.files, "copy")
    peer.files.remove_tree("copy")
    return peer.files, copy


DIRECTORY, CHECKPOINT = small_directory()


def paths_of(files: SimulatedFiles) -> list[str]:
    return sorted(path for path in files._names if files.size(path))


def damage(found: Verified) -> list[str]:
    return [str(finding) for finding in found.findings if finding.damage]


@pytest.mark.parametrize("files", [DIRECTORY, CHECKPOINT], ids=["directory", "checkpoint"])
def test_what_is_sound_is_sound(files: SimulatedFiles) -> None:
    seen: list[str] = []
    found = verify(files.copy(), seen.append)
    assert found.findings == []
    assert found.sound
    assert sorted(seen) == paths_of(files)
    assert found.files == len(seen)
    assert found.nbytes == sum(files.size(path) for path in seen)
    assert {path.split("/")[0] for path in seen} >= {"identity.json", "log", "snapshots", "tables"}
    found.raise_for_damage()


@pytest.mark.parametrize("path", paths_of(DIRECTORY))
def test_every_flipped_byte_of_a_directory_is_found(path: str) -> None:
    files = DIRECTORY.copy()
    for at in range(files.size(path)):
        bit = 8 * at + at % 8
        files.flip_bit(path, bit)
        found = verify(files)
        assert not found.sound, f"bit {bit} of {path}"
        assert any(path in finding.path for finding in found.findings)
        files.flip_bit(path, bit)
    with pytest.raises(CorruptionError):
        found.raise_for_damage()


@pytest.mark.parametrize("path", ["backup.json", "identity.json", "log/SYNCED"])
def test_every_flipped_byte_of_what_only_a_checkpoint_has_is_found(path: str) -> None:
    files = CHECKPOINT.copy()
    for at in range(files.size(path)):
        bit = 8 * at + 7 - at % 8
        files.flip_bit(path, bit)
        assert not verify(files).sound, f"bit {bit} of {path}"
        files.flip_bit(path, bit)


@pytest.mark.parametrize("path", paths_of(CHECKPOINT))
def test_every_missing_and_every_shortened_file_of_a_checkpoint_is_found(path: str) -> None:
    files = CHECKPOINT.copy()
    files.cut(path, files.size(path) - 1)
    assert not verify(files).sound
    files.delete(path)
    missing = verify(files)
    # Without its manifest it is a data directory like any other.
    assert missing.sound == (path == "backup.json"), missing.findings


def test_every_missing_file_of_a_directory_that_is_needed_is_found() -> None:
    for path in paths_of(DIRECTORY):
        files = DIRECTORY.copy()
        files.delete(path)
        assert not verify(files).sound, path


def test_a_torn_tail_and_what_is_unfinished_are_notes() -> None:
    files = DIRECTORY.copy()
    last = [path for path in paths_of(files) if path.endswith(".arrows") and path.startswith("log/")][-1]
    file = files.open_append(last)
    file.write(b"torn")
    files.put("tables/00000000-0.tmp", b"x")
    files.put("snapshots/README", b"x")
    files.put("notes.txt", b"x")
    found = verify(files)
    assert found.sound
    text = "\n".join(map(str, found.findings))
    assert "last 4 bytes are a torn write" in text
    assert text.count("note:") == 4


def test_one_damaged_file_does_not_hide_another() -> None:
    files = DIRECTORY.copy()
    tables = [path for path in paths_of(files) if path.startswith("tables/")]
    for path in (*tables[:2], "identity.json"):
        files.flip_bit(path, 99)
    assert len(damage(verify(files))) >= 3


def test_on_a_real_disk(tmp_path: Path) -> None:
    for path in paths_of(DIRECTORY):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(DIRECTORY.read(path))
    before = sorted(tmp_path.rglob("*"))
    assert verify(SystemFiles(tmp_path)).findings == []
    assert sorted(tmp_path.rglob("*")) == before
    assert not verify(SystemFiles(tmp_path / "log")).sound
