"""The simulator is proven by what it notices: every planted bug must break an invariant within its number of histories."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mutants.hunt import mutants

HUNT = Path(__file__).with_name("hunt.py")


@pytest.mark.parametrize("name", mutants())
def test_a_planted_bug_is_noticed(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(HUNT), name], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "noticed by seed" in done.stdout
