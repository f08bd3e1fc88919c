"""What an examination finds: one plain sentence, how bad it is, and what to do about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Level(enum.Enum):
    """How bad a finding is."""

    GOOD = "good"
    NOTE = "note"
    """Worth knowing; nothing to do."""
    WARNING = "warning"
    """Works, and will not for ever or not in every case."""
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `advice` is empty if there is nothing to do."""

    check: str
    """Which check it is of, e.g. ``"name"``, ``"connect"``, ``"tls"``, ``"leader"``: for programs."""
    where: str
    """``host:port``, or ``"cluster"``."""
    level: Level
    words: str
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "where": self.where,
            "level": self.level.value,
            "words": self.words,
            "advice": self.advice,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order in which they were made."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is a problem."""
        return not any(finding.level is Level.PROBLEM for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"healthy": self.healthy, "findings": [finding.as_json() for finding in self.findings]}


class Notes:
    """Collects the findings about one place. Not thread-safe."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.findings: list[Finding] = []

    def good(self, check: str, words: str) -> None:
        self.findings.append(Finding(check, self.where, Level.GOOD, words))

    def note(self, check: str, words: str) -> None:
        self.findings.append(Finding(check, self.where, Level.NOTE, words))

    def warn(self, check: str, words: str, advice: str) -> None:
        self.findings.append(Finding(check, self.where, Level.WARNING, words, advice))

    def problem(self, check: str, words: str, advice: str) -> None:
        self.findings.append(Finding(check, self.where, Level.PROBLEM, words, advice))
