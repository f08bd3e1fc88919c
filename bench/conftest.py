"""What the benchmarks share: floors measured in the same run, and ratios printed beside every figure."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory on the disk that is measured; ``--basetemp`` chooses which."""
    return tmp_path_factory.mktemp("disk")
