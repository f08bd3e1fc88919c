"""One target under atheris (libFuzzer), which follows the coverage of marble's Python and runs for as long as one likes.

    python tests/fuzz/atheris_run.py ticket -max_total_time=600 -rss_limit_mb=2048 -timeout=10

The first argument names a target of `fuzz.targets`, or "port" for a whole node (none: it lists them), the rest is libFuzzer's.
Valid inputs are the corpus to
begin with; the changes are those of `fuzz.mutate`, half of them with checksums made right again, beside libFuzzer's own. An
input that finds something is kept as ``crash-…``: give its path as the last argument to repeat it. Not collected by pytest,
which needs no atheris.
"""

from __future__ import annotations

import gc
import random
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))  # What follows is found there.

from fuzz.live import live_node
from fuzz.mutate import BYTES_MAX, Change, changed
from fuzz.target import Target
from fuzz.targets import TARGETS


def main(name: str, *options: str) -> None:
    """Attack the target `name` until libFuzzer ends, which ends the process."""
    known = {each.name.replace(" ", "_"): each for each in TARGETS}
    if name == "port":
        with tempfile.TemporaryDirectory() as directory, live_node(Path(directory)) as live:
            _run(live.target(), options)
    if name not in known:
        sys.exit(f"name one of: {', '.join(known)}, port")
    _run(known[name], options)


def _run(target: Target, options: Sequence[str]) -> None:
    seeds = target.seeds()
    # Not by hooks at import: those see nothing of a package that is installed to be edited.
    for function in [each for each in gc.get_objects() if isinstance(each, types.FunctionType)]:
        if str(function.__module__).partition(".")[0] in ("marble", "json", "tomllib"):
            atheris.instrument_func(function)

    def attack(data: bytes) -> None:
        target.attack(data)  # Whether it was taken is nothing to libFuzzer, to which a result means something else.

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.3:
            data = atheris.Mutate(data, min(size_max, BYTES_MAX))
        else:
            # What only kernels look at shows no coverage, and libFuzzer forgets all but the shortest of it.
            data = changed(
                chance.choice((data, *seeds)), [Change.drawn(chance) for _ in range(chance.randrange(1, 4))], seeds
            )
        return (target.mend(data) if chance.random() < 0.5 else data)[:size_max]

    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(data)
        inputs = [option for option in options if not option.startswith("-")]
        arguments = [sys.argv[0], f"-max_len={BYTES_MAX}", *options, *([] if inputs else [corpus])]
        atheris.Setup(arguments, attack, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*(sys.argv[1:] or [""]))
