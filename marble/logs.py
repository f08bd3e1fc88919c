"""Logs: where they go, in which form, and how often the same line may come.

Rule 1: marble only ever logs to the loggers of `COMPONENTS`. A program that never calls `initialize_logging` has Python's own default
and configures them as it likes; one that calls it gets one handler on the logger ``marble``, and nothing else is touched.
Rule 2: a line names what happened and to whom, never what was in it: no row, no key's value, no token, no certificate's key. What is
passed to a logger by marble's own code is made of names, numbers and errors of marble. Of an error of somebody else's that may quote
a value (`QUOTING`) only the class and the way to it are written.
Rule 3: a fault that repeats must not fill a disk. The same words from the same place come at most `REPEATS_MAX` times in
`REPEATS_INTERVAL_S`; the rest is counted, and the count is told.

A line's fields (`fields`) are for programs: which node, which peer. The words stay the same for people.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TextIO

from marble.errors import MarbleError, UsageError

COMPONENTS: Final = {
    "marble.node": "a node's life: start, stop, failures of its engine",
    "marble.raft": "roles, terms, leaders, members",
    "marble.transport": "links between nodes, and streams that were refused",
    "marble.log": "the durable log: what was recovered, what was lost",
    "marble.lsm": "files of tables: compaction, damage, healing",
    "marble.server": "calls of clients, the HTTP port, credentials",
    "marble.client": "a client's files of credentials",
}
"""Every logger that marble uses, and what it is about."""

FORMATS: Final = ("text", "json")
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

REPEATS_MAX: Final = 10
"""How often the same words from the same place are written within `REPEATS_INTERVAL_S` seconds."""

REPEATS_INTERVAL_S: Final = 10.0

PLACES_MAX: Final = 256
"""How many places of the code are told apart when repeats are counted; the one that was quiet for longest is forgotten."""

MESSAGE_CHARACTERS_MAX: Final = 4000
"""Longer messages are cut: a line is to be read."""

QUOTING: Final = (ValueError, LookupError)
"""What Arrow and Python raise about a value, often quoting it. marble's own UsageError is a ValueError too, and not meant."""

_TEXT_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_FIELDS: Final = "marble_fields"


def fields(**values: int | float | str | bool | None) -> dict[str, Any]:
    """What to pass as ``extra=`` so that a line has these fields, e.g. ``fields(node=1, peer=2)``."""
    return {_FIELDS: values}


@dataclass(slots=True)
class _Place:
    """How often one place has spoken. ``0 <= suppressed``; `last` is the last line that was held back, if any was."""

    began: float
    written: int = 0
    suppressed: int = 0
    last: logging.LogRecord | None = None


class Repeats:
    """Decides which lines are written. Not thread-safe: the handler's lock is around it.

    - Bounded: at most `PLACES_MAX` places, each with one line.
    - Nothing is lost without a word: what was held back is counted in a line of its own, written with the next line of whatever
      place after the interval, or by `rest`.

    Parameters
    ----------
    clock
        Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._places: OrderedDict[tuple[str, str, int, str], _Place] = OrderedDict()

    def take(self, record: logging.LogRecord) -> list[logging.LogRecord]:
        """What is to be written now that `record` has come, in order."""
        now = self._clock()
        told = self._end_intervals(now)
        key = (record.name, record.pathname, record.lineno, str(record.msg))
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= PLACES_MAX:
                _, quiet = self._places.popitem(last=False)
                told += _told(quiet)
            place = self._places[key] = _Place(now)
        self._places.move_to_end(key)
        if place.written < REPEATS_MAX:
            place.written += 1
            return [*told, record]
        place.suppressed += 1
        place.last = record
        return told

    def rest(self) -> list[logging.LogRecord]:
        """What is still to be told of what was held back; all is forgotten then."""
        told = [line for place in self._places.values() for line in _told(place)]
        self._places.clear()
        return told

    def _end_intervals(self, now: float) -> list[logging.LogRecord]:
        over = [key for key, place in self._places.items() if now - place.began >= REPEATS_INTERVAL_S]
        return [line for key in over for line in _told(self._places.pop(key))]


def _told(place: _Place) -> list[logging.LogRecord]:
    """The line that says how often `place` was held back: none if it never was."""
    last = place.last
    if last is None:
        return []
    line = logging.makeLogRecord(last.__dict__)
    times = "once more" if place.suppressed == 1 else f"{place.suppressed} times more"
    line.msg, line.args, line.exc_info, line.exc_text = f"repeated {times}, last: {last.getMessage()}", None, None, None
    setattr(line, _FIELDS, {**getattr(last, _FIELDS, {}), "repeated": place.suppressed})
    return [line]


class Handler(logging.StreamHandler[TextIO]):
    """Writes marble's lines to a stream, repeats held back."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._repeats = Repeats(clock)

    def emit(self, record: logging.LogRecord) -> None:
        # `handle` holds the handler's lock.
        for line in self._repeats.take(record):
            super().emit(line)

    def close(self) -> None:
        self.acquire()
        try:
            for line in self._repeats.rest():
                super().emit(line)
        finally:
            self.release()
        super().close()


class _Formatter(logging.Formatter):
    """What both forms have in common: tracebacks without values."""

    def formatException(self, ei: Any) -> str:  # noqa: N802
        told = traceback.TracebackException(*ei)
        pending, seen = [(told, ei[1])], set()
        while pending:
            each, error = pending.pop()
            if error is None or id(error) in seen:
                continue
            seen.add(id(error))
            if isinstance(error, QUOTING) and not isinstance(error, MarbleError):
                # The one attribute that holds the words, of which Python makes the last line.
                each._str = "(its words may quote data and are not written)"  # type: ignore[attr-defined]
                each.__notes__ = None
            pending += [
                (link, source)
                for link, source in ((each.__cause__, error.__cause__), (each.__context__, error.__context__))
                if link is not None
            ]
            if each.exceptions is not None and isinstance(error, BaseExceptionGroup):
                pending += zip(each.exceptions, error.exceptions, strict=True)
        return "".join(told.format()).rstrip("\n")


class JsonFormatter(_Formatter):
    """One JSON object a line: ``time`` (RFC 3339, UTC), ``level``, ``component``, ``node`` if one is known, ``message``, the line's
    fields, ``thread``, and ``error`` with a traceback where there is one.

    Parameters
    ----------
    node
        The node of this process, for lines that do not name one.
    """

    def __init__(self, node: int | None = None) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        known: Mapping[str, Any] = getattr(record, _FIELDS, {})
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.created % 1 * 1000):03d}Z",
            "level": record.levelname.lower(),
            "component": record.name,
        }
        if self._node is not None:
            line["node"] = self._node
        line |= {name: value for name, value in known.items() if value is not None}
        line["message"] = _cut(record.getMessage())
        line["thread"] = record.threadName
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, separators=(",", ":"))


class TextFormatter(_Formatter):
    """One line for people; local time."""

    def __init__(self) -> None:
        super().__init__(_TEXT_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        # A message of several lines would look like several messages; a traceback comes below it, as everywhere.
        record.message = _cut(record.message).replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


def _cut(message: str) -> str:
    return message if len(message) <= MESSAGE_CHARACTERS_MAX else message[: MESSAGE_CHARACTERS_MAX - 1] + "…"


_lock = threading.Lock()
_installed: Handler | None = None


def initialize_logging(
    level: str | int = "INFO", *, json_lines: bool = False, stream: TextIO | None = None, node: int | None = None
) -> None:
    """Write what marble has to say to `stream`. Called again, it replaces what it did before.

    Parameters
    ----------
    level
        What is written: "DEBUG", "INFO", "WARNING", "ERROR" or "CRITICAL", in any case, or the number of one.
    json_lines
        Whether each line is a JSON object, for programs, and no text for people.
    stream
        Where to; default: stderr.
    node
        With `json_lines`: the node of lines that name none.

    Raises
    ------
    UsageError
        If there is no such level.
    """
    global _installed
    number = check_level(level)
    handler = Handler(stream)
    handler.setFormatter(JsonFormatter(node) if json_lines else TextFormatter())
    logger = logging.getLogger("marble")
    with _lock:
        _remove(logger)
        logger.addHandler(handler)
        logger.setLevel(number)
        # What the program's own root logger prints is its own; each line is to come once.
        logger.propagate = False
        _installed = handler


def end_logging() -> None:
    """Undo `initialize_logging`: what was held back is told, and marble's loggers are as Python made them. Idempotent."""
    with _lock:
        logger = logging.getLogger("marble")
        if _remove(logger):
            logger.setLevel(logging.NOTSET)
            logger.propagate = True


def _remove(logger: logging.Logger) -> bool:
    global _installed
    handler, _installed = _installed, None
    if handler is None:
        return False
    logger.removeHandler(handler)
    handler.close()
    return True


def check_level(level: object, what: str = "level") -> int:
    """The number of a level. Raises UsageError, which calls it `what`, if there is none such."""
    if isinstance(level, str) and level.upper() in LEVELS:
        return int(getattr(logging, level.upper()))
    if isinstance(level, int) and not isinstance(level, bool) and logging.getLevelName(level) in LEVELS:
        return level
    raise UsageError(f"{what} must be one of {', '.join(LEVELS)}, not {level!r}")


def check_format(form: object, what: str = "format") -> str:
    """`form` if it is one of `FORMATS`. Raises UsageError, which calls it `what`, if it is not."""
    if not isinstance(form, str) or form not in FORMATS:
        raise UsageError(f"{what} must be one of {', '.join(FORMATS)}, not {form!r}")
    return form


def _after_fork_in_child() -> None:
    # The parent's other threads, one of which may have held the lock, are not here.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
