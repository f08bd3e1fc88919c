"""Who may connect: the tables ``[node.tls]`` and ``[node.tokens]``, and the file of the cluster's secret.

Only names of files stand here; `marble.transport.security` reads them, and reads them again while the node runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from marble.config.values import check_bool, read_table, shown
from marble.errors import UsageError

RELOAD_S_MIN: Final = 0.05
RELOAD_S_MAX: Final = 86_400.0

PEER_NAMES_MAX: Final = 256
_PEER_NAME = re.compile(r"[A-Za-z0-9*_.:/@+-]{1,255}")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Certificates of a node: the table ``[node.tls]``.

    Parameters
    ----------
    certificate, key
        PEM files: the node's certificate with the chain up to its CA, and its private key.
    ca
        PEM file: who signs the nodes' certificates. A node connects to no other.
    client_ca
        PEM file: who signs the clients' certificates, if that is not `ca`. Needs `client_certificates`.
    client_certificates
        Whether everyone who connects, node or client, must have a certificate of `ca` or `client_ca` (mutual TLS).
    peer_names
        The first alternative name (or, without any, the common name) of a node's certificate must match one of these;
        ``*`` stands for any characters. Needs `client_certificates`. Empty: nodes prove themselves by the cluster's secret, if
        there is one, or any certificate of `ca` is a node's.
    reload_s
        How often the files are looked at, in seconds; what has changed is used from then on, without a restart.
    """

    certificate: Path
    key: Path
    ca: Path
    client_ca: Path | None = None
    client_certificates: bool = False
    peer_names: Sequence[str] = ()
    reload_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("certificate", "key", "ca", "client_ca"):
            if name != "client_ca" or self.client_ca is not None:
                object.__setattr__(self, name, check_path(f"[node.tls] {name}", getattr(self, name)))
        check_bool("[node.tls] client_certificates", self.client_certificates)
        _check_reload("[node.tls] reload_s", self.reload_s)
        object.__setattr__(self, "peer_names", _check_names(self.peer_names))
        for name in ("client_ca", "peer_names"):
            if getattr(self, name) and not self.client_certificates:
                raise UsageError(f"[node.tls] {name} is of use only with client_certificates = true")


@dataclass(frozen=True, slots=True)
class TokensConfig:
    """Bearer tokens of clients: the table ``[node.tokens]``.

    Parameters
    ----------
    file
        TOML file: who has which token and what it is for (`marble.transport.tokens`).
    reload_s
        How often the file is looked at, in seconds.
    """

    file: Path
    reload_s: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", check_path("[node.tokens] file", self.file))
        _check_reload("[node.tokens] reload_s", self.reload_s)


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """All of it. Without anything a node takes everybody, and belongs inside a trusted network.

    Parameters
    ----------
    tls
        Encrypted connections. All nodes of a cluster have it or none (``[cluster] enable_ssl``).
    tokens
        What clients must bring.
    secret_file
        A file whose content, 32 bytes at least, all nodes of the cluster know and nobody else.

    Raises
    ------
    UsageError
        If clients' certificates come from a CA of their own and nothing else tells nodes from clients.
    """

    tls: TlsConfig | None = None
    tokens: TokensConfig | None = None
    secret_file: Path | None = None

    def __post_init__(self) -> None:
        if self.secret_file is not None:
            object.__setattr__(self, "secret_file", check_path("[node] secret_file", self.secret_file))
        tls = self.tls
        if tls is not None and tls.client_ca is not None and self.secret_file is None:
            raise UsageError(
                "[node.tls] client_ca needs [node] secret_file: nodes and clients share a port, and whoever signs clients' "
                "certificates could else sign one that makes its holder a node"
            )

    @classmethod
    def from_mapping(cls, node: dict[str, Any], directory: Path) -> SecurityConfig:
        """What the table ``[node]`` of a file says. Relative names of files start at `directory`."""
        tls = node.get("tls")
        tokens = node.get("tokens")
        secret = node.get("secret_file")
        return cls(
            None if tls is None else read_table(TlsConfig, located(tls, directory, _TLS_FILES), "node.tls"),
            None if tokens is None else read_table(TokensConfig, located(tokens, directory, ("file",)), "node.tokens"),
            None if secret is None else directory / check_path("[node] secret_file", secret),
        )


_TLS_FILES: Final = ("certificate", "key", "ca", "client_ca")


def located(table: Any, directory: Path, names: Sequence[str]) -> Any:
    """`table` with its keys `names`, where they are strings, as paths that start at `directory`."""
    if not isinstance(table, dict):
        return table
    return {
        key: directory / value if key in names and isinstance(value, str) and value else value
        for key, value in table.items()
    }


def check_path(name: str, value: object) -> Path:
    """The path `value`; UsageError if it is none."""
    if not isinstance(value, str | Path) or not str(value):
        raise UsageError(f"{name} must name a file, not {shown(value)}")
    return Path(value)


def _check_reload(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not RELOAD_S_MIN <= value <= RELOAD_S_MAX:
        raise UsageError(f"{name} must be {RELOAD_S_MIN} to {RELOAD_S_MAX:.0f} seconds, not {shown(value)}")


def _check_names(names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) > PEER_NAMES_MAX:
        raise UsageError(f"[node.tls] peer_names must be a list of at most {PEER_NAMES_MAX} names, not {shown(names)}")
    for name in names:
        if not isinstance(name, str) or _PEER_NAME.fullmatch(name) is None:
            raise UsageError(f"[node.tls] peer_names: {shown(name)} is not the name of a node")
    return tuple(names)
