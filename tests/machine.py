"""The one place where a test is left out: when this machine lacks what the test needs, which is then its reason."""

from __future__ import annotations

from typing import NoReturn

import pytest


def machine_lacks(reason: object) -> NoReturn:
    """Leave this test, or those of this fixture, out. `reason` says what is missing, for who reads the summary."""
    pytest.skip(f"this machine: {reason}")
