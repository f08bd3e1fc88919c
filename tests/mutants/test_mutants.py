"""The simulator is proven by what it notices: every planted bug must break a history within its number of seeds.

All of them take minutes, so a run takes some, drawn anew each time; ``MARBLE_TEST_MUTANTS=all`` takes all.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.hunt import mutants

HUNT = Path(__file__).with_name("hunt.py")
ALL = os.environ.get("MARBLE_TEST_MUTANTS") == "all"
FRESH_SEED = int(os.environ.get("MARBLE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
NAMES = sorted(mutants())
PLACES = len(NAMES) if ALL else 6


@pytest.mark.parametrize("place", range(PLACES))
def test_a_planted_bug_is_noticed(place: int) -> None:
    # Which ones is decided in here: the names of tests must be the same in every process of a run.
    order = NAMES if ALL else random.Random(f"{FRESH_SEED} {place}").sample(NAMES, 1) * PLACES
    name = order[place]
    print(f"{name}: repeat with MARBLE_TEST_SEED={FRESH_SEED}")
    done = subprocess.run(
        [sys.executable, "-P", str(HUNT), name], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "noticed by seed" in done.stdout


def test_there_are_enough_of_them() -> None:
    assert len(NAMES) >= 25
    assert all(mutant["why"] and mutant["find"] != mutant["replace"] for mutant in mutants().values())


@pytest.mark.parametrize("name", NAMES)
def test_its_place_stands_exactly_once(name: str) -> None:
    mutant = mutants()[name]
    spec = importlib.util.find_spec(mutant["module"])
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).read_text().count(mutant["find"]) == 1
