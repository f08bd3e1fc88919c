"""Backups: made of a directory or of a running node, and made a node again: ``marble backup`` and ``marble restore``.

A backup is a checkpoint (`marble.checkpoint`) in a place of its own: identity, log, snapshots, files of tables, and a manifest. How it is
made, and a directory of it, says `marble.archive`; here is where the files are, and which node answers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marble.archive import (
    Progress,
    back_up_directory,
    back_up_node,
    in_peace,
    restore_directory,
)
from marble.client import ClientOptions, RemoteBackend
from marble.config import parse_url
from marble.env import SystemFiles
from marble.errors import ProtocolError, UnavailableError, UsageError
from marble.transport.papers import credentials_for
from marble.transport.wire import encode_json
from marble.verify import Verified, verify


def backup(
    source: str | os.PathLike[str], target: str | os.PathLike[str], progress: Progress | None = None
) -> Verified:
    """Make a backup of a data directory that no node uses, or of a running node.

    Parameters
    ----------
    source
        The directory, or ``grpc://host:port``: the first node of the URL that answers. That has applied by then what was
        acknowledged anywhere before the call.
    target
        A new directory.
    progress
        See there.

    Returns
    -------
    Verified
        What the backup holds.

    Raises
    ------
    UsageError
        There is no such directory, or `target` exists.
    UnavailableError
        A node uses the directory; or none could be reached.
    CorruptionError
        Something in `source` is damaged. There is no backup.
    OSError
        A disk failed or is full.
    """
    told, place = progress or _tell_nobody, Path(target).absolute()
    parent, url = SystemFiles(place.parent), os.fspath(source)
    if not url.startswith(("grpc://", "grpc+")):
        return back_up_directory(SystemFiles(source), parent, place.name, told)
    endpoints = parse_url(url)
    with contextlib.closing(RemoteBackend(endpoints, ClientOptions(credentials=credentials_for(url)))) as backend:
        return back_up_node(_Remote(backend, endpoints), parent, place.name, told)


def restore(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    cluster_id: str,
    nodes: Mapping[int, str] | None = None,
    node_id: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Make a data directory of a new cluster from a backup, or from a data directory that no node uses.

    Parameters
    ----------
    source
        The backup. It is only read.
    target
        A new directory.
    cluster_id
        Of the new cluster: another name than the old one's, so that no node of that takes it for its own. What `marble.open`
        opens is a cluster called "embedded" of node 1 alone.
    nodes
        Who the members are, ``host:port`` by node id. None: node 1 alone. With several, each needs a directory of its own,
        restored from the same backup in the same way but for `node_id`.
    node_id
        Whose directory this is: the smallest of `nodes`, if None.
    progress
        See there.

    Returns
    -------
    Verified
        What the directory holds.

    Raises
    ------
    UsageError
        An argument is wrong, or `target` exists.
    UnavailableError
        A node uses `source`.
    CorruptionError
        Something in `source` is damaged. There is no new directory.
    OSError
        A disk failed or is full.
    """
    place = Path(target).absolute()
    return restore_directory(
        SystemFiles(source),
        SystemFiles(place.parent),
        place.name,
        cluster_id,
        dict(nodes or {}),
        node_id,
        progress or _tell_nobody,
    )


def verify_directory(path: str | os.PathLike[str], progress: Progress | None = None) -> Verified:
    """Check every byte of a data directory that no node uses, or of a backup. See `marble.verify`.

    Raises
    ------
    UsageError
        There is no such directory.
    UnavailableError
        A node uses it.
    """
    if not Path(path).is_dir():
        raise UsageError(f"there is no directory {os.fspath(path)}")
    files = SystemFiles(path)
    with in_peace(files):
        return verify(files, progress)


class _Remote:
    """The first node of a URL that can make a backup; see `marble.archive.Source`."""

    def __init__(self, backend: RemoteBackend, endpoints: Sequence[str]) -> None:
        self.name = endpoints[-1]
        self._backend = backend
        self._endpoints = endpoints
        self._token = ""

    def begin(self) -> Mapping[str, object]:
        answer = self._begin()
        token, listed = answer.get("token"), answer.get("files")
        if not isinstance(token, str) or not isinstance(listed, dict):
            raise ProtocolError(f"{self.name} did not say what a backup consists of")
        self._token = token
        return listed

    def _begin(self) -> dict[str, Any]:
        for endpoint in self._endpoints[:-1]:
            with contextlib.suppress(UnavailableError):
                answer = self._backend.ask_one(endpoint, "begin_backup", b"")
                self.name = endpoint
                return answer
        return self._backend.ask_one(self._endpoints[-1], "begin_backup", b"")

    def read(self, path: str, offset: int, bytes_max: int) -> bytes:
        asked = {"token": self._token, "path": path, "offset": offset, "bytes": bytes_max}
        return self._backend.ask_bytes(self.name, "read_backup", encode_json(asked))

    def end(self) -> None:
        # A node that is not there any more has dropped it, or will when it starts.
        with contextlib.suppress(UnavailableError):
            self._backend.ask_one(self.name, "end_backup", encode_json({"token": self._token}))


def _tell_nobody(path: str) -> None:
    pass
