"""Stopping a Flight server at a deadline. Layout, ownership and invariants: head of ``_shutdown.pyx``."""

import weakref
from typing import Any

import pyarrow.flight as fl

def shut_down(server: fl.FlightServerBase, grace_s: float) -> None:
    """Refuse new calls, wait up to `grace_s` seconds for open ones, cancel the rest, return when all have ended.

    A handler that is stuck in its own code and never looks at its stream is not interrupted: call this on a thread of
    its own if you cannot wait for that. Does nothing once the server's finalizer has run.

    Raises
    ------
    RuntimeError
        Arrow could not do it.
    """

def finalizer_of(server: fl.FlightServerBase) -> weakref.finalize[Any, Any]:
    """The ``weakref.finalize`` that pyarrow runs at exit; it waits for open calls without a deadline."""

def immortalize(value: object) -> None:
    """Keep `value`, and all that it holds, from ever being destroyed: for what would hang in its destructor."""
