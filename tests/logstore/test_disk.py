"""The simulated disk: where it must behave as the real one, and that its faults do happen."""

from __future__ import annotations

from pathlib import Path

import pytest
from logstore.support import disk

from marble.env import Files, SystemFiles
from marble.errors import UnavailableError
from marble.testing.disk import SECTOR_BYTES, DiskCrash


@pytest.fixture(params=["system", "simulated"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return SystemFiles(tmp_path) if request.param == "system" else disk()


def test_both_disks_behave_alike(files: Files) -> None:
    files.make_directory("a/b")
    assert files.exists("a")
    assert not files.exists("a/b/f")
    file = files.create("a/b/f")
    file.write(b"hello ")
    file.write(memoryview(b"world"))
    assert (file.size, files.size("a/b/f")) == (11, 11)
    file.sync()
    file.close()
    file.close()
    assert files.read("a/b/f") == b"hello world"
    assert files.read("a/b/f", 6) == b"world"
    assert files.read("a/b/f", 4, 4) == b"o wo"
    assert files.read("a/b/f", 9, 100) == b"ld"
    assert files.read("a/b/f", 50, 1) == b""
    with pytest.raises(FileExistsError):
        files.create("a/b/f")
    again = files.open_append("a/b/f")
    assert again.size == 11
    again.write(b"!")
    files.truncate("a/b/f", 5)
    files.overwrite("a/b/f", b"J")
    files.overwrite("a/b/g", b"new")
    assert files.read("a/b/f") == b"Jello"
    assert files.list("a/b") == ["f", "g"]
    files.rename("a/b/f", "a/b/g")
    files.sync_directory("a/b")
    assert files.list("a/b") == ["g"]
    assert files.read("a/b/g") == b"Jello"
    files.remove("a/b/g")
    assert files.list("a/b") == []
    for call in (files.open_append, files.size, files.read, files.remove):
        with pytest.raises(FileNotFoundError):
            call("a/b/g")
    with files.lock("LOCK"), pytest.raises(UnavailableError):
        files.lock("LOCK").__enter__()
    with files.lock("LOCK"):
        pass
    assert "a/b/g" in files.describe("a/b/g")


def survivors(data: bytes) -> set[bytes]:
    """What crashes leave of `data`, written behind a durable sector and never synced."""
    found = set()
    for seed in range(200):
        files = disk(seed)
        files.make_directory("log")
        files.put("log/other", b"o" * 4 * SECTOR_BYTES)
        files.put("log/f", b"d" * SECTOR_BYTES)
        files.open_append("log/f").write(data)
        files.crash()
        left = files.read("log/f")
        assert left.startswith(b"d" * SECTOR_BYTES)
        found.add(left[SECTOR_BYTES:])
    return found


def test_crash_leaves_nothing_all_a_prefix_holes_or_stale_bytes() -> None:
    data = b"1" * SECTOR_BYTES + b"2" * SECTOR_BYTES + b"3" * 100
    found = survivors(data)
    assert {b"", data} <= found
    assert any(data.startswith(left) and len(left) % SECTOR_BYTES for left in found)
    assert any(left.startswith(bytes(SECTOR_BYTES)) for left in found)
    assert any(b"o" in left for left in found)


def test_what_was_synced_survives_and_names_need_their_directory_synced() -> None:
    kept = set()
    for seed in range(50):
        files = disk(seed)
        files.make_directory("log")
        durable = files.create("log/durable")
        files.sync_directory("log")
        durable.write(b"safe")
        durable.sync()
        files.create("log/new").sync()
        files.rename("log/durable", "log/renamed")
        files.crash()
        names = files.list("log")
        assert files.read("log/" + ("renamed" if "renamed" in names else "durable")) == b"safe"
        kept.add(tuple(names))
    assert kept == {("durable",), ("durable", "new"), ("renamed",), ("new", "renamed")}


def test_failed_sync_keeps_the_data_in_sight_and_off_the_disk() -> None:
    files = disk()
    files.make_directory("log")
    file = files.create("log/f")
    files.sync_directory("log")
    file.write(b"lost")
    files.fail_at = files.operations + 1
    with pytest.raises(OSError, match="simulated failure"):
        file.sync()
    file.sync()
    assert files.read("log/f") == b"lost"
    files.crash()
    assert files.read("log/f") == b""


def test_nothing_works_without_power_and_old_files_stay_dead() -> None:
    files = disk()
    files.make_directory("log")
    file = files.create("log/f")
    files.lose_power_at = files.operations + 1
    with pytest.raises(DiskCrash):
        file.write(b"x")
    for call in (
        file.sync,
        lambda: file.write(b"y"),
        lambda: files.sync_directory("log"),
        lambda: files.create("log/g"),
    ):
        with pytest.raises(DiskCrash):
            call()
    files.crash()
    with pytest.raises(DiskCrash):
        file.write(b"z")
    files.create("log/g").write(b"works again")


def test_a_mapping_sees_what_befalls_its_file_and_outlives_its_name() -> None:
    files = disk()
    files.put("d/a", b"abc")
    mapped = files.map("d/a")
    assert mapped.to_pybytes() == b"abc"
    files.flip_bit("d/a", 0)
    assert mapped.to_pybytes() == b"`bc"
    files.remove("d/a")
    files.sync_directory("d")
    files.crash()
    assert mapped.to_pybytes() == b"`bc"
    assert not files.exists("d/a")


def test_a_link_is_durable_after_a_sync_of_its_directory() -> None:
    kept = set()
    for seed in range(20):
        files = disk(seed)
        files.put("d/a", b"abc")
        files.make_directory("e")
        files.link("d/a", "e/a")
        with pytest.raises(FileExistsError):
            files.link("d/a", "e/a")
        assert files.read("e/a") == b"abc"
        if seed % 2:
            files.sync_directory("e")
        files.crash()
        kept.add((seed % 2, files.exists("e/a")))
        assert files.read("d/a") == b"abc"
    assert kept == {(0, False), (0, True), (1, True)}


def test_mappings_and_links_of_a_real_disk(tmp_path: Path) -> None:
    files = SystemFiles(tmp_path)
    files.make_directory("d")
    for path, data in (("d/a", b"abc"), ("d/empty", b"")):
        file = files.create(path)
        file.write(data)
        file.close()
    mapped, empty = files.map("d/a"), files.map("d/empty")
    files.link("d/a", "d/b")
    with pytest.raises(FileExistsError):
        files.link("d/a", "d/b")
    files.remove("d/a")
    files.rename("d/empty", "d/a")
    assert (mapped.to_pybytes(), empty.to_pybytes(), files.read("d/b")) == (b"abc", b"", b"abc")
    with pytest.raises(FileNotFoundError):
        files.map("d/none")
