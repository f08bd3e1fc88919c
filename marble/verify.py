"""Whether all bytes of a data directory, or of a backup, are as they were written: ``marble verify``.

Rule 1: every byte of every file is covered: by the seal of the identity and of a manifest, by the log's frames and mark, by the
checksums of a snapshot, by the name of a file that is named by its content.
Rule 2: nothing is written, and one damaged file does not keep the others from being looked at.
Rule 3: what a crash leaves is told apart from damage where that is possible; a torn tail of the log is a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from marble.checkpoint import CHECKPOINTS, DIRECTORIES, MANIFEST, read_manifest
from marble.env import Files
from marble.errors import CorruptionError, InvariantError
from marble.identity import (
    ACQUAINTANCES_FILE,
    FORMAT_VERSION,
    IDENTITY_FILE,
    LOCK_FILE,
    read_acquaintances,
    unseal,
)
from marble.logstore import contents, segment
from marble.logstore.contents import ContentFiles
from marble.logstore.log import Log, LogOptions
from marble.logstore.replay import GroupState
from marble.logstore.scan import RecoveryReport
from marble.logstore.snapshot_file import FileReader, SnapshotInfo
from marble.logstore.snapshots import snapshot_path, snapshot_paths
from marble.machine import FileRef
from marble.recovery import newest

_TABLE_FILE: Final = re.compile(r"([0-9a-f]{8})-([0-9a-f]{32})\.arrow")
_UNFINISHED: Final = (".tmp", ".part")
_STRANGER: Final = "it is none of marble's files, and was not looked at"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. ``damage``: else it is only worth to be known."""

    path: str
    problem: str
    offset: int | None = None
    damage: bool = True

    def __str__(self) -> str:
        where = self.path if self.offset is None else f"{self.path}, offset {self.offset}"
        return f"{'damaged' if self.damage else 'note'}: {where}: {self.problem}"


@dataclass(slots=True)
class Verified:
    """What was looked at, and found."""

    files: int = 0
    nbytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    snapshots: dict[int, list[SnapshotInfo]] = field(default_factory=dict)
    """Sound ones with all their files, by group, ascending."""
    groups: dict[int, GroupState] = field(default_factory=dict)
    """What the log holds of each group, if it is sound."""

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not any(finding.damage for finding in self.findings)

    def raise_for_damage(self) -> None:
        """Raise CorruptionError for the first damage, if there is any."""
        for finding in self.findings:
            if finding.damage:
                raise CorruptionError(finding.problem, finding.path, finding.offset)


def verify(files: Files, progress: Callable[[str], None] | None = None) -> Verified:
    """Read all files of a node's data directory or of a backup, and check every byte.

    The directory must not be in use: what comes and goes meanwhile would look like damage.

    Parameters
    ----------
    files
        The directory.
    progress
        Called with the path of each file before it is read.
    """
    return _Verifier(files, progress or (lambda path: None)).run()


class _Verifier:
    def __init__(self, files: Files, progress: Callable[[str], None]) -> None:
        self._files = files
        self._progress = progress
        self._found = Verified()
        self._sound: dict[int, set[FileRef]] = {}
        """The sound files of tables, by group."""

    def run(self) -> Verified:
        files, found = self._files, self._found
        self._verify_root()
        self._verify_log()
        self._verify_tables()
        for path, group in snapshot_paths(files):
            self._look_at(path, lambda path=path, group=group: self._verify_snapshot(path, group))  # type: ignore[misc]
        self._note_strangers()
        for group, state in found.groups.items():
            infos = sorted(found.snapshots.get(group, []), key=lambda info: info.index)
            found.snapshots[group] = infos
            if state.purged_index and newest(infos, state.term_index) is None:
                self._add(
                    segment.DIRECTORY,
                    f"the log of group {group} begins after entry {state.purged_index}, and no sound snapshot goes up to there",
                )
        return found

    def _add(self, path: str, problem: str, offset: int | None = None, *, damage: bool = True) -> None:
        self._found.findings.append(Finding(self._files.describe(path), problem, offset, damage))

    def _look_at(self, path: str, check: Callable[[], None]) -> None:
        """Run `check`, which reads all of one file, and note what it finds."""
        self._progress(path)
        try:
            self._found.nbytes += self._files.size(path)
            self._found.files += 1
            check()
        except CorruptionError as error:
            self._found.findings.append(
                Finding(error.path or self._files.describe(path), error.problem, error.offset or 0)
            )
        except OSError as error:
            self._add(path, f"it cannot be read: {error.strerror or error}")

    def _verify_root(self) -> None:
        files = self._files
        if files.exists(IDENTITY_FILE):
            where = files.describe(IDENTITY_FILE)
            self._look_at(
                IDENTITY_FILE, lambda: check_identity(unseal(files.read(IDENTITY_FILE), "identity file", where))
            )
        else:
            self._add(IDENTITY_FILE, "it is missing: whose data these are is not known")
        if files.exists(ACQUAINTANCES_FILE):
            self._look_at(ACQUAINTANCES_FILE, self._verify_acquaintances)
        if files.exists(MANIFEST):
            self._look_at(MANIFEST, self._verify_manifest)
        if files.exists(LOCK_FILE) and files.size(LOCK_FILE):
            self._add(LOCK_FILE, "it is not empty")

    def _verify_acquaintances(self) -> None:
        read_acquaintances(self._files)

    def _verify_manifest(self) -> None:
        for path, nbytes in read_manifest(self._files).items():
            if not self._files.exists(path):
                self._add(path, "it is missing from the backup")
            elif self._files.size(path) != nbytes:
                self._add(path, f"it has {self._files.size(path)} bytes, not {nbytes} as the manifest says")

    def _verify_log(self) -> None:
        files, found = self._files, self._found
        if not files.exists(segment.DIRECTORY):
            return
        paths = [segment.segment_path(number) for number in segment.segment_numbers(files)]
        for path in paths:
            self._progress(path)
            found.nbytes += files.size(path)
            found.files += 1
        if files.exists(segment.SYNCED_PATH):
            self._look_at(segment.SYNCED_PATH, self._verify_mark)
        elif paths:
            self._add(
                segment.SYNCED_PATH, "it is missing, as after a copy: damage at the log's end looks like a torn tail"
            )
        try:
            log = Log.open(files, LogOptions(cache_bytes_max=0), writable=False)
        except CorruptionError as error:
            found.findings.append(Finding(error.path or files.describe(segment.DIRECTORY), error.problem, error.offset))
        except InvariantError as error:
            self._add(segment.DIRECTORY, str(error))
        else:
            found.groups = log.groups
            self._judge_end(log.report)
            log.close()

    def _verify_mark(self) -> None:
        mark = self._files.read(segment.SYNCED_PATH)
        problem = segment.check_mark(mark)
        if not mark:
            # It is never synced, and a file system may keep the name alone. No flipped bit makes a file empty.
            self._add(segment.SYNCED_PATH, "it is empty, as after a loss of power", damage=False)
        elif problem is not None:
            self._add(segment.SYNCED_PATH, problem, 0)

    def _judge_end(self, report: RecoveryReport) -> None:
        path = report.cut_path or self._files.describe(segment.DIRECTORY)
        if report.lost_durable_bytes:
            problem = f"the log ends {report.lost_durable_bytes} bytes before what had been durable"
            self._found.findings.append(Finding(path, problem, report.cut_offset))
        elif report.cut_path is not None:
            problem = f"the last {report.cut_bytes} bytes are a torn write, which the node cuts off when it starts"
            self._found.findings.append(Finding(path, problem, report.cut_offset, damage=False))

    def _verify_tables(self) -> None:
        for name in self._names(contents.DIRECTORY):
            match = _TABLE_FILE.fullmatch(name)
            if match is not None:
                path = f"{contents.DIRECTORY}/{name}"
                group = int(match[1], 16)
                self._look_at(path, lambda path=path, group=group, name=match[2]: self._verify_table(path, group, name))  # type: ignore[misc]

    def _verify_table(self, path: str, group: int, name: str) -> None:
        ref = FileRef(name, self._files.size(path))
        ContentFiles(self._files, group).verify(ref)
        self._sound.setdefault(group, set()).add(ref)

    def _verify_snapshot(self, path: str, group: int) -> None:
        reader = FileReader(self._files, path)
        info = reader.verify(group)
        if snapshot_path(info) != path:
            raise reader.damage(0, f"it is of entry {info.index} of term {info.term}, which its name denies")
        there = self._sound.get(group, set())
        missing = [ref for ref in reader.refs() if ref not in there]
        named = ContentFiles(self._files, group)
        for ref in missing:
            if not self._files.exists(named.path(ref.name)):
                self._add(named.path(ref.name), f"it is missing, and the snapshot of entry {info.index} needs it")
            elif self._files.size(named.path(ref.name)) != ref.nbytes:
                self._add(named.path(ref.name), f"the snapshot of entry {info.index} needs {ref.nbytes} bytes of it")
        if not missing:
            self._found.snapshots.setdefault(group, []).append(info)

    def _note_strangers(self) -> None:
        """Say which files were not looked at."""
        ours = {path for path, _ in snapshot_paths(self._files)} | {segment.SYNCED_PATH}
        ours |= {segment.segment_path(number) for number in segment.segment_numbers(self._files)}
        for folder in DIRECTORIES:
            for name in self._names(folder):
                path = f"{folder}/{name}"
                if path not in ours and not (folder == contents.DIRECTORY and _TABLE_FILE.fullmatch(name)):
                    self._note(path)
        for name in self._files.list(""):
            if name not in (IDENTITY_FILE, ACQUAINTANCES_FILE, MANIFEST, LOCK_FILE, CHECKPOINTS, *DIRECTORIES):
                self._note(name)

    def _note(self, path: str) -> None:
        self._add(path, "unfinished, and not looked at" if path.endswith(_UNFINISHED) else _STRANGER, damage=False)

    def _names(self, folder: str) -> Sequence[str]:
        return self._files.list(folder) if self._files.exists(folder) else ()


def check_identity(found: dict[str, object]) -> None:
    """Raise CorruptionError unless this is what an identity file says."""
    voters = found.get("voters")
    if found.get("format") != FORMAT_VERSION or not isinstance(voters, list) or not all(type(v) is int for v in voters):
        raise CorruptionError("the identity file is of another version of marble, or says nothing")
