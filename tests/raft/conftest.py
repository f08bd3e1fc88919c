"""`pytest tests/raft --rewrite` writes what the cores say now into the transcripts, to be read in review."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", default=False, help="write the transcripts anew")
