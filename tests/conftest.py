"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

_OURS = "MARBLE_"


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_OURS)}


@pytest.fixture(autouse=True)
def _environment_stays_as_it_was() -> Iterator[None]:
    """A variable of ours that one test leaves behind changes what the next one finds, and which is next, chance decides."""
    before = _environment()
    yield
    assert _environment() == before
