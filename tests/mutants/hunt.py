"""Run the simulator on marble with one planted bug: ``python -P hunt.py NAME``. Ends with 0 if the bug was noticed, else with 1.

The bug is put into the module's source while it is imported; nothing on disk changes, and nothing else in the process is different.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

CATALOGUE = Path(__file__).with_name("mutants.toml")
STEPS = 5000
SEEDS = 60


def mutants() -> dict[str, dict[str, Any]]:
    """All planted bugs by name."""
    return {mutant["name"]: mutant for mutant in tomllib.loads(CATALOGUE.read_text())["mutant"]}


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module with its bug."""

    def __init__(self, mutant: dict[str, Any]) -> None:
        self._mutant = mutant
        self._path = ""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._mutant["module"]:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.origin:
                self._path = spec.origin
                return importlib.util.spec_from_file_location(name, spec.origin, loader=self)
        return None

    def exec_module(self, module: ModuleType) -> None:
        source = Path(self._path).read_text()
        if source.count(self._mutant["find"]) != 1:
            raise SystemExit(f"{self._mutant['name']}: its place does not stand exactly once in {module.__name__}")
        exec(
            compile(source.replace(self._mutant["find"], self._mutant["replace"]), self._path, "exec"), module.__dict__
        )


def hunt(mutant: dict[str, Any]) -> int:
    """Play histories until one breaks. Returns the seed that noticed the bug, or 0."""
    from marble.testing.cluster import simulate

    for seed in range(1, mutant.get("seeds", SEEDS) + 1):
        try:
            simulate(mutant.get("plan", "swarm"), seed, STEPS, nodes=mutant.get("nodes", 0))
        except Exception as error:
            print(f"{mutant['name']}: noticed by seed {seed}: {type(error).__name__}: {error}")
            return seed
    return 0


if __name__ == "__main__":
    chosen = mutants()[sys.argv[1]]
    sys.meta_path.insert(0, Planter(chosen))
    if not hunt(chosen):
        sys.exit(f"{chosen['name']} ({chosen['why']}) survived {chosen.get('seeds', SEEDS)} histories")
