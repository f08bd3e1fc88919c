"""Freed memory: kept while a process works, given back when it rests (`marble.memory`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from machine import machine_lacks

from marble.memory import BLOCK_BYTES_MAX, KEPT_BYTES_MAX, REST_SHARE, REST_WINDOW_S, WORK_S, Housekeeper

PROGRAM = """
import ctypes, json, resource, sys
import marble.memory as memory

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults(size, times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        # Several at once: glibc comes to keep one such block by itself.
        blocks = [libc.malloc(size) for _ in range(8)]
        for block in blocks:
            libc.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

kept = memory.keep_freed_memory()
faults(SIZE, 2)
found = {"kept": kept, "faults": faults(SIZE, 20)}
# Blocks that live between free ones keep all of it from the kernel, until it is given back.
blocks = [libc.malloc(1 << 20) for _ in range(200)]
for block in blocks:
    libc.memset(block, 1, 1 << 20)
pins = [libc.malloc(64) for _ in range(100)]
for block in blocks[:-1]:
    libc.free(block)
before = resident()
memory.give_back_freed_memory()
found["given_back"] = before - resident()
print(json.dumps(found))
"""


def run(size: int, **environment: str) -> dict[str, int]:
    """What that program finds with blocks of `size` bytes, in a process of its own: it changes the process's allocator."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-P", "-c", PROGRAM.replace("SIZE", str(size))]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    if not found["kept"] and not environment:
        machine_lacks("its C library is not glibc")
    return found


def test_blocks_that_come_and_go_are_not_faulted_in_again() -> None:
    size = BLOCK_BYTES_MAX // 2
    assert 8 * size < KEPT_BYTES_MAX
    assert run(size)["faults"] < size // os.sysconf("SC_PAGE_SIZE")


def test_what_is_free_between_blocks_that_live_is_given_back() -> None:
    assert run(1 << 20)["given_back"] > 2 * KEPT_BYTES_MAX


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4:glibc.malloc.trim_threshold=131072"},
    ],
)
def test_who_has_set_the_tunables_has_decided(environment: dict[str, str]) -> None:
    size = BLOCK_BYTES_MAX // 2
    found = run(size, **environment)
    assert not found["kept"]
    assert found["faults"] > size // os.sysconf("SC_PAGE_SIZE")


def test_another_tunable_decides_nothing() -> None:
    run(1 << 20)  # Left out where there is none to keep.
    assert run(1 << 20, GLIBC_TUNABLES="glibc.malloc.arena_max=4")["kept"]


class Process:
    """A housekeeper and the process that it looks after, by hand."""

    def __init__(self) -> None:
        self.now = self.spent = 0.0
        self.given = 0
        self.keeper = Housekeeper(lambda: self.now, lambda: self.spent, self.give)

    def give(self) -> None:
        self.given += 1
        # It takes its time; that is not work after which there is something to give back.
        self.now += 2.0
        self.spent += 2.0

    def go(self, seconds: float, share: float) -> int:
        """Pass so many seconds, of which the process works that share, and look twice a second; how often memory was given back."""
        before = self.given
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            self.spent += 0.5 * share
            given = self.given
            assert self.keeper.look() == (self.given > given)
        return self.given - before


def test_memory_is_given_back_once_for_each_time_of_work() -> None:
    process = Process()
    process.spent = WORK_S  # It has started.
    assert process.go(REST_WINDOW_S - 1, 0.0) == 0
    assert process.go(60, 0.0) == 1
    assert process.go(60, 2 * REST_SHARE) == 0
    assert process.go(60, 0.0) == 1
    assert process.go(600, 0.0) == 0
    assert process.go(REST_WINDOW_S, 3.0) == 0
    assert process.go(2 * REST_WINDOW_S, 0.0) == 1


def test_bursts_that_are_shorter_than_a_window_add_up() -> None:
    """Each is so short that its window is one of rest, and leaves memory behind all the same."""
    process = Process()
    for _ in range(3):
        for _ in range(3):
            assert process.go(0.5, WORK_S / 2) == 0
            assert process.go(2 * REST_WINDOW_S, 0.0) == 0
        assert process.go(0.5, WORK_S / 2) + process.go(2 * REST_WINDOW_S, 0.0) == 1


def test_a_process_that_never_rests_keeps_what_it_has() -> None:
    assert Process().go(3600, 1.5 * REST_SHARE) == 0
