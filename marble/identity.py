"""Whose data directory this is: bound for good, at first use, to one node of one cluster.

Rule 1: a log answers for one voter only (Raft §5.2). A directory that changed hands would let one node speak with another's votes, so
the binding is durable before the log is first opened, and a log without one is not trusted.
Rule 2: who the voters are before the first entry is bound as well. From then on only entries change it: were it read from a
configuration at each start, an edit at one node could make two majorities that do not overlap.

A directory that was wiped cannot be told from one that is new. A node that lost its directory has forgotten its votes, so it
must not come back under its old id: it is removed from the cluster and added again, under a new one (`NodeOptions.join`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from marble.env import Files
from marble.errors import CorruptionError, UsageError

IDENTITY_FILE: Final = "identity.json"
LOCK_FILE: Final = "LOCK"
LOG_DIRECTORY: Final = "log"
FORMAT_VERSION: Final = 1
"""Of the data directory. A node refuses a directory of another version."""


def bind(files: Files, cluster_id: str, node_id: int, voters: Sequence[int] = ()) -> tuple[int, ...]:
    """Check that the directory belongs to this node, or make it so if it is new.

    Parameters
    ----------
    files
        The directory.
    cluster_id, node_id
        Whose it is.
    voters
        Who votes before the first entry, if the directory is new; none if this node waits to be added.

    Returns
    -------
    tuple of int
        Who votes before the first entry: what was bound when it was new.

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
        try:
            found = json.loads(files.read(IDENTITY_FILE))
        except ValueError:
            raise CorruptionError("the identity file cannot be read", where, 0) from None
        bound = found.pop("voters", None) if isinstance(found, dict) else None
        if found != mine:
            raise UsageError(f"{where} belongs to {found}, not to {mine}: choose another directory")
        if not isinstance(bound, list) or not all(isinstance(voter, int) for voter in bound):
            raise CorruptionError("the identity file does not say who the first voters were", where, 0)
        return tuple(bound)
    if files.exists(LOG_DIRECTORY):
        raise CorruptionError("there is a log but no identity file beside it", where)
    temporary = IDENTITY_FILE + ".tmp"
    if files.exists(temporary):
        files.remove(temporary)
    file = files.create(temporary)
    try:
        file.write(json.dumps({**mine, "voters": list(voters)}).encode())
        file.sync()
    finally:
        file.close()
    files.rename(temporary, IDENTITY_FILE)
    files.sync_directory("")
    return tuple(voters)
