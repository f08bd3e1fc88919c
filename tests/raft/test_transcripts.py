"""Every transcript still says what it said when it was last read in review."""

from __future__ import annotations

from pathlib import Path

import pytest
from raft.harness import play, transcripts


@pytest.mark.parametrize("path", transcripts(), ids=lambda path: path.stem)
def test_transcript(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text()
    now = play(text)
    # A full run loads this directory's conftest after the options are parsed, so the option may be unknown there.
    if request.config.getoption("--rewrite", default=False):
        path.write_text(now)
        return
    assert now == text, "read the difference; if it is right, run: pytest tests/raft --rewrite"


def test_there_are_transcripts() -> None:
    assert len(transcripts()) >= 25
