"""Checks of single values, in the words that every config error uses: the key, what it holds, what it may hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from marble.errors import UsageError

T = TypeVar("T")


def shown(value: object) -> str:
    """Kind and value of what a user gave, shortened."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def check_int(name: str, value: object, lowest: int, highest: int) -> int:
    """`value`, if it is a whole number from `lowest` to `highest`; else UsageError."""
    # bool is an int in Python, but `max_entry_size = true` in a file is a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, not {shown(value)}")
    if not lowest <= value <= highest:
        raise UsageError(f"{name} is {value}: it must be within {lowest} to {highest}")
    return value


def check_bool(name: str, value: object) -> None:
    """Raise UsageError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {shown(value)}")


def check_keys(values: object, names: Sequence[str], required: Sequence[str], where: str) -> None:
    """Raise UsageError unless `values` is a table with all `required` keys and none but `names`."""
    if not isinstance(values, Mapping):
        raise UsageError(f"[{where}] must be a table of keys, not {shown(values)}")
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
            raise UsageError(f"unknown key {key!r} in [{where}]: did you mean {near[0]!r}?")
    for key in required:
        if key not in values:
            raise UsageError(f"[{where}] has no {key!r}: it must be given")


def read_table(kind: type[T], values: object, where: str) -> T:
    """Make a `kind`, a dataclass, of the table ``[where]`` of a file: its fields are the keys.

    Raises
    ------
    UsageError
        For an unknown or missing key, or as `kind` itself.
    """
    items = [item for item in fields(kind) if item.init]  # type: ignore[arg-type]  # any dataclass
    required = [item.name for item in items if item.default is MISSING and item.default_factory is MISSING]
    check_keys(values, [item.name for item in items], required=required, where=where)
    arguments: Mapping[str, Any] = values  # type: ignore[assignment]  # check_keys has seen that it is one
    return kind(**arguments)
