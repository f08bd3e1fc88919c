"""How long the log's syncs take while files are written beside it, by how much of a file goes under one sync.

    python bench/beside.py

Settings take turns; each turn begins with a disk that has everything and with memory that is backed (`report.settle`). The log takes
an entry every few milliseconds, as under a steady stream; the file is written as a flush or a compaction writes it, at the pace of
quiet times and, once more, as fast as the disk takes it. Read the quantiles beside each other, not alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
from report import machine, settle
from work import Shape

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.env import SystemFiles
from marble.logstore.log import Log, LogOptions
from marble.pacing import Pacer
from marble.types import EntryKind, HardState
from marble.writing import write_paced

_MIB: Final = 1 << 20
PAUSE_S: Final = 0.003
"""Between two syncs of the log."""
BYTES_PER_S: Final = 64 * _MIB
"""The pace of quiet times, as `marble.options.NodeOptions` has it."""
MESSAGE_BYTES: Final = 64 * 1024
"""What the writer of sstables hands out at a time, about."""
UNSYNCED: Final = 1 << 40

ENTRIES: Final = {"4 KiB": 4 << 10, "528 KB": 528_000}


def log_beside(root: Path, entry_bytes: int, sync_bytes: int | None, paced: bool, file_bytes: int) -> list[float]:
    """Seconds of each sync of the log while a file is written, or, if `sync_bytes` is None, for as long as that would take."""
    files = SystemFiles(root)
    stopped, written = threading.Event(), threading.Event()
    pacer = Pacer(BYTES_PER_S, lambda: 0.0 if paced else 1.0, stopped)
    message = os.urandom(MESSAGE_BYTES)

    def write() -> None:
        with contextlib.closing(files.create("file")) as file:
            write_paced(file, (message for _ in range(file_bytes // MESSAGE_BYTES)), pacer, sync_bytes or UNSYNCED)
        written.set()

    proposal = Proposal(EntryKind.COMMAND, 0, pa.py_buffer(os.urandom(entry_bytes)))
    log = Log.open(files, LogOptions(segment_bytes_max=1 << 30))
    writer = threading.Thread(target=write, name="marble-bench-file", daemon=True)
    took: list[float] = []
    end = time.monotonic() + file_bytes / BYTES_PER_S
    with contextlib.closing(log):
        if sync_bytes is not None:
            writer.start()
        index = 0
        while time.monotonic() < end if sync_bytes is None else not written.is_set():
            index += 1
            log.append(1, HardState(1, 1, index - 1), entry_batch.build(1, index, 1, [proposal]))
            started = time.perf_counter()
            log.sync()
            took.append(time.perf_counter() - started)
            stopped.wait(PAUSE_S)
        if sync_bytes is not None:
            writer.join()
    return took


def quantiles(took: Sequence[float]) -> str:
    ordered = sorted(took)
    cells = [ordered[int((len(ordered) - 1) * part)] for part in (0.5, 0.9, 0.99, 1.0)]
    return " | ".join(f"{cell * 1e3:.2f}" for cell in cells) + f" | {len(ordered)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each setting")
    parser.add_argument("--file-mib", type=int, default=96, help="written beside the log in each turn")
    parser.add_argument("--directory", type=Path, help="where (default: the system's for temporary files)")
    given = parser.parse_args()
    print(machine())
    file_bytes = given.file_mib * _MIB
    settings: list[tuple[int | None, bool]] = [(None, True)]
    settings += [(nbytes, paced) for paced in (True, False) for nbytes in (_MIB, 2 * _MIB, 4 * _MIB, 8 * _MIB)]
    for what, entry_bytes in ENTRIES.items():
        found: dict[tuple[int | None, bool], list[float]] = {setting: [] for setting in settings}
        for number in range(given.rounds):
            for setting in settings if number % 2 == 0 else settings[::-1]:
                with tempfile.TemporaryDirectory(dir=given.directory, prefix="marble-bench-") as root:
                    settle(Shape(100_000, 16, 512))
                    found[setting] += log_beside(Path(root), entry_bytes, *setting, file_bytes)
        print(f"\n### Syncs of the log, entries of {what}, ms\n")
        print("| beside it | half | 90 % | 99 % | longest | syncs |\n|---|---:|---:|---:|---:|---:|")
        for (nbytes, paced), took in found.items():
            pace = "64 MiB/s" if paced else "without a pace"
            title = "nothing" if nbytes is None else f"a file, {nbytes // _MIB} MiB a sync, {pace}"
            print(f"| {title} | {quantiles(took)} |", flush=True)


if __name__ == "__main__":
    main()
