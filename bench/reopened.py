"""What the first reads cost of databases that were just opened: the files in the system's memory, and nothing of them read yet.

A few other keys are read first, so that no store pays for its program's first steps in the time of its data's. "Again" is the same
call once more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import peers
from peers import Form, Marble, installed
from work import Keys, Layout, Shape

OPENED: Final = Layout("just opened", 1)
FIRST_KEYS: Final = 20
KEYS: Final = 1000
WAYS: Final[dict[str, Callable[[Any, Keys], object]]] = {
    "get": lambda store, keys: store.get(keys.listed),
    "get_many(1000)": lambda store, keys: store.get_many(keys),
}


def _some(shape: Shape, seed: int, count: int) -> Keys:
    return Keys(random.Random(seed).choices(shape.keys, k=count))


def reopened(
    shape: Shape, directory: Callable[[], Path], rounds: int, timed: Callable[[Callable[[], object]], float]
) -> list[tuple[str, dict[str, float], float | None]]:
    """For each way to read: seconds a key of each store, the best of so many openings. `timed` tells how long a call takes."""
    turns = []
    for make in installed().values():
        path = directory()
        store = make(path, shape, OPENED)
        peers.load(store, shape, OPENED)
        store.close()
        turns += [(make, path, form) for form in ((Form.ARROW, Form.BYTES) if make is Marble else (None,))]
    lines: dict[str, dict[str, float]] = {f"{way}, {when}": {} for way in WAYS for when in ("first", "again")}
    for seed in range(rounds):
        keys, few = _some(shape, seed, KEYS), _some(shape, -seed - 1, FIRST_KEYS)
        for make, path, form in turns:
            for way, read in WAYS.items():
                store = make(path, shape, OPENED)
                try:
                    asked = store.other(form) if isinstance(store, Marble) and form is not None else store
                    for warm in WAYS.values():
                        warm(asked, few)
                    for when in ("first", "again"):
                        best = lines[f"{way}, {when}"]
                        took = timed(partial(read, asked, keys)) / KEYS
                        best[asked.name] = min(best.get(asked.name, took), took)
                finally:
                    store.close()
    return [(name, best, None) for name, best in lines.items()]
