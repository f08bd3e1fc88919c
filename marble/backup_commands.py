"""The commands ``marble backup``, ``restore`` and ``verify``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marble.errors import UsageError


def add_backup_commands(commands: Any, place: Callable[[str], tuple[int, str]]) -> None:
    """Add the three to `commands`; `place` reads ``ID=HOST:PORT``."""
    backup = commands.add_parser(
        "backup",
        help="copy a node's data, verified",
        description="Copy the data of a directory that no node uses, or of a running node, and verify the copy.",
    )
    backup.add_argument("source", metavar="DIR|URL", help="a data directory, or grpc://host:port")
    backup.add_argument("target", type=Path, metavar="TARGET", help="a new directory")
    backup.set_defaults(command=_backup)

    restore = commands.add_parser(
        "restore",
        help="make a backup a node of a new cluster",
        description="Make a data directory of a new cluster from a backup, with new members, and verify it. With several --node, repeat it "
        "for each of them, with its --as and a directory of its own.",
    )
    restore.add_argument("backup", type=Path, metavar="BACKUP", help="what marble backup has made, or a data directory")
    restore.add_argument("directory", type=Path, metavar="DIR", help="a new directory")
    restore.add_argument("--cluster-id", required=True, metavar="NEW", help="name of the new cluster")
    restore.add_argument(
        "--node",
        type=place,
        action="append",
        default=[],
        metavar="ID=HOST:PORT",
        help="a member of it (default: node 1 alone)",
    )
    restore.add_argument(
        "--as", type=int, dest="node_id", metavar="ID", help="whose directory it is (default: the first)"
    )
    restore.set_defaults(command=_restore)

    verify = commands.add_parser(
        "verify",
        help="read every byte of a data directory or a backup, and check it",
        description="Check every byte of every file of a data directory that no node uses, or of a backup. Ends with 1 if any is damaged.",
    )
    verify.add_argument("directory", type=Path, metavar="DIR", help="a node's data directory, or a backup")
    verify.set_defaults(command=_verify)


def _backup(options: argparse.Namespace) -> int:
    from marble.backup import backup

    found = backup(options.source, options.target)
    print(f"{options.target}: a backup of {found.files} files, {found.nbytes} bytes, verified")
    return 0


def _restore(options: argparse.Namespace) -> int:
    from marble.backup import restore
    from marble.config import parse_endpoint

    nodes = dict(options.node)
    if len(nodes) < len(options.node):
        raise UsageError("a node stands twice")
    for endpoint in nodes.values():
        parse_endpoint(endpoint)
    found = restore(options.backup, options.directory, options.cluster_id, nodes, options.node_id)
    print(f"{options.directory}: restored, {found.files} files, {found.nbytes} bytes, verified")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from marble.backup import verify_directory

    found = verify_directory(options.directory)
    for finding in found.findings:
        print(finding)
    damaged = sum(finding.damage for finding in found.findings)
    print(f"{found.files} files, {found.nbytes} bytes: {f'{damaged} damaged' if damaged else 'all as written'}")
    return 1 if damaged else 0
