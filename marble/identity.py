"""Whose data directory this is: bound for good, at first use, to one node of one cluster; and whose the others' are.

Rule 1: a log answers for one voter only (Raft §5.2). A directory that changed hands would let one node speak with another's votes, so
the binding is durable before the log is first opened, and a log without one is not trusted.
Rule 2: who the voters are before the first entry is bound as well. From then on only entries change it: were it read from a
configuration at each start, an edit at one node could make two majorities that do not overlap.
Rule 3: one voter answers with one directory only. A node that lost its directory has forgotten its votes and what it
acknowledged, and an empty one looks new to itself. Therefore each directory is given an *incarnation* when it is bound, a
random number that no other has, and each node keeps the one under which it first met each other node, and refuses any
other. Who lost a directory is removed from the cluster and added again, under a new id (`NodeOptions.join`).

A copy that is put back is the same incarnation: that an older state of a directory came back goes unnoticed here.

Each file is one object of JSON, of which the last member is the XXH3-64 of the others.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from marble._core.checksum import xxh3_64
from marble.env import Files, Random, SystemRandom
from marble.errors import CorruptionError, InvariantError, ProtocolError, UsageError
from marble.metrics import Metrics
from marble.types import NODE_ID_MAX

IDENTITY_FILE: Final = "identity.json"
ACQUAINTANCES_FILE: Final = "acquaintances.json"
LOCK_FILE: Final = "LOCK"
LOG_DIRECTORY: Final = "log"
FORMAT_VERSION: Final = 1
"""Of the data directory. A node refuses a directory of another version."""
ACQUAINTANCES_MAX: Final = 4096
"""More ids than a cluster uses up; bounds what a stranger who invents some can make a node keep."""

_log = logging.getLogger("marble.transport")


def seal(value: Mapping[str, Any]) -> bytes:
    """`value` as JSON, its last member the ``checksum`` of the others."""
    plain = {name: each for name, each in value.items() if name != "checksum"}
    return json.dumps({**plain, "checksum": f"{xxh3_64(json.dumps(plain).encode()):016x}"}).encode()


def unseal(data: bytes, what: str, where: str) -> dict[str, Any]:
    """What `seal` made `data` of. Raises CorruptionError if it is not that, to the byte."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptionError(f"the {what} cannot be read", where, 0) from None
    if not isinstance(found, dict) or seal(found) != data:
        raise CorruptionError(f"the {what} is damaged", where, 0)
    del found["checksum"]
    return found


class Identity(NamedTuple):
    """What a directory was bound to."""

    voters: tuple[int, ...]
    """Who votes before the first entry."""
    incarnation: int
    """Which directory this is: 1 to 2**64 - 1."""


def bind(
    files: Files, cluster_id: str, node_id: int, voters: Sequence[int] = (), random: Random | None = None
) -> Identity:
    """Check that the directory belongs to this node, or make it so if it is new.

    Parameters
    ----------
    files
        The directory.
    cluster_id, node_id
        Whose it is.
    voters
        Who votes before the first entry, if the directory is new; none if this node waits to be added.
    random
        Where the incarnation comes from, if the directory is new. By default the operating system; what is seeded the
        same gives the same number again, and then two directories cannot be told apart.

    Returns
    -------
    Identity
        What was bound when the directory was new.

    Raises
    ------
    UsageError
        It belongs to another node, cluster or version.
    CorruptionError
        The identity is unreadable, or there is a log and no identity.
    """
    mine = {"format": FORMAT_VERSION, "cluster_id": cluster_id, "node_id": node_id}
    where = files.describe(IDENTITY_FILE)
    if files.exists(IDENTITY_FILE):
        data = files.read(IDENTITY_FILE)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            raise CorruptionError("the identity file cannot be read", where, 0) from None
        # One without a checksum was written by an early version, or is told by what it lacks.
        if isinstance(found, dict) and "checksum" in found and seal(found) != data:
            raise CorruptionError("the identity file is damaged", where, 0)
        bound = number = None
        if isinstance(found, dict):
            found.pop("checksum", None)
            bound, number = found.pop("voters", None), found.pop("incarnation", None)
        if found != mine:
            raise UsageError(f"{where} belongs to {ascii(found)[:200]}, not to {mine}: choose another directory")
        if not isinstance(bound, list) or not all(isinstance(voter, int) for voter in bound):
            raise CorruptionError("the identity file does not say who the first voters were", where, 0)
        incarnation = _parse(number)
        if incarnation is None:
            raise CorruptionError("the identity file does not say which incarnation the directory is", where, 0)
        return Identity(tuple(bound), incarnation)
    if files.exists(LOG_DIRECTORY):
        raise CorruptionError("there is a log but no identity file beside it", where)
    return make_identity(files, cluster_id, node_id, voters, random)


def make_identity(
    files: Files, cluster_id: str, node_id: int, voters: Sequence[int], random: Random | None = None
) -> Identity:
    """Bind a directory that has no identity, whatever else is in it, durably; parameters as those of `bind`."""
    identity = Identity(tuple(voters), (random or SystemRandom()).randrange(1, 1 << 64))
    mine = {"format": FORMAT_VERSION, "cluster_id": cluster_id, "node_id": node_id}
    _replace(files, IDENTITY_FILE, {**mine, "voters": list(voters), "incarnation": _format(identity.incarnation)})
    return identity


class Acquaintances:
    """The incarnation under which this node first met each other node, for as long as this directory lasts. Thread-safe.

    Parameters
    ----------
    files
        The directory.
    incarnation
        Its own.
    metrics
        Where refusals are counted: ``transport_incarnations_refused``.

    Raises
    ------
    CorruptionError
        What was kept cannot be read.
    """

    def __init__(self, files: Files, incarnation: int, metrics: Metrics) -> None:
        self.incarnation = incarnation
        self._files = files
        self._lock = threading.Lock()
        self._broken = False
        self._told: dict[int, int] = {}
        self._refused = metrics.counter("transport_incarnations_refused")
        self._met = read_acquaintances(files) if files.exists(ACQUAINTANCES_FILE) else {}

    def meet(self, node: int, incarnation: int) -> None:
        """Let `node` pass if it is new or comes with the directory that it had; who is new is kept before this returns.

        Raises
        ------
        ProtocolError
            `node` comes with another directory than it had, or does not say with which.
        InvariantError
            The disk failed; this node must stop.
        """
        if not incarnation:
            raise ProtocolError(f"node {node} does not say which data directory it has")
        with self._lock:
            known = self._met.get(node)
            if known is None:
                self._keep(node, incarnation)
                return
            if known == incarnation:
                return
            news = self._told.get(node) != incarnation
            self._told[node] = incarnation
        self._refused.add()
        message = (
            f"the data directory of node {node} was replaced, and with it went votes and entries that it answered for: "
            f"remove node {node} from the cluster and add it under a new id (`marble members`)"
        )
        if news:
            _log.error("%s; it was %s and is %s", message, _format(known), _format(incarnation))
        raise ProtocolError(message)

    def _keep(self, node: int, incarnation: int) -> None:
        if len(self._met) >= ACQUAINTANCES_MAX:
            raise ProtocolError(f"node {node} is one more than the {ACQUAINTANCES_MAX} nodes that can be told apart")
        # What a failed sync has lost, the next one would not find.
        failure = "it failed before" if self._broken else ""
        met = {**self._met, node: incarnation}
        kept = {str(each): _format(number) for each, number in sorted(met.items())}
        if not failure:
            try:
                _replace(self._files, ACQUAINTANCES_FILE, {"met": kept})
                self._met = met
            except OSError as error:
                self._broken, failure = True, str(error)
        if failure:
            where = self._files.describe(ACQUAINTANCES_FILE)
            raise InvariantError(f"{where} cannot be written: {failure}")


def read_acquaintances(files: Files) -> dict[int, int]:
    """What `Acquaintances` has kept: node -> incarnation. Raises CorruptionError if it is not that, to the byte."""
    where = files.describe(ACQUAINTANCES_FILE)
    what = "record of the other nodes' data directories"
    found = unseal(files.read(ACQUAINTANCES_FILE), what, where)
    try:
        met = {int(node): _parse(number) for node, number in found["met"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptionError(f"the {what} cannot be read", where, 0) from None
    if not all(1 <= node <= NODE_ID_MAX and number for node, number in met.items()):
        raise CorruptionError(f"the {what} cannot be read", where, 0)
    return {node: number for node, number in met.items() if number is not None}


def _replace(files: Files, path: str, content: dict[str, Any]) -> None:
    """Make `content` that of the file at `path`, durably, all or nothing."""
    temporary = path + ".tmp"
    if files.exists(temporary):
        files.remove(temporary)
    file = files.create(temporary)
    try:
        file.write(seal(content))
        file.sync()
    finally:
        file.close()
    files.rename(temporary, path)
    files.sync_directory("")


def _format(incarnation: int) -> str:
    # JSON's numbers end at 2**53 for most who read it.
    return f"{incarnation:016x}"


def _parse(text: object) -> int | None:
    if not isinstance(text, str) or len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        return None
    return int(text, 16) or None
