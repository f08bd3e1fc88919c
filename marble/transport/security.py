"""Certificates, tokens and the cluster's secret of a node or a client, as their files say.

Rule 1: what is here is whole: a `Security` is made of files that fit each other (the key is the certificate's, every PEM can be
read), or not at all. It never changes; what has changed on disk becomes another one (`marble.transport.watching`).
Rule 2: secrets never show. No ``repr`` and no error has a byte of a key, a token or the cluster's secret.
Rule 3: the other side's certificate is always checked, and its name against the host that was dialled. There is no switch.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import pyarrow.flight as fl

from marble.config import SecurityConfig, TlsConfig
from marble.errors import UsageError
from marble.transport.proof import PEER_HEADER, SECRET_BYTES_MAX, SECRET_BYTES_MIN, Secret
from marble.transport.tokens import FILE_BYTES_MAX, TokenFile, check_token, parse_tokens

PEM_BYTES_MAX: Final = 1024 * 1024
"""A chain, or a bundle of all CAs of a company, is far smaller."""

TOKEN_HEADER: Final = "authorization"
BEARER: Final = "Bearer "


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """What one side brings when it connects, and what it wants of the other.

    Parameters
    ----------
    tls
        Whether to encrypt.
    ca
        PEM: who may have signed the other's certificate. None: whom this machine trusts.
    certificate, key
        PEM: to show, if asked for one.
    token
        Gives the bearer token for each call, or None for none.
    peer
        Gives the header `PEER_HEADER` of a call between nodes.
    """

    tls: bool = False
    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    token: Callable[[], str | None] | None = None
    peer: Callable[[], str] | None = None

    def location(self, endpoint: str) -> str:
        """The Flight location of the node at `endpoint`."""
        return f"{'grpc+tls' if self.tls else 'grpc'}://{endpoint}"

    def client(self, endpoint: str, generic_options: Sequence[tuple[str, int | str]] = ()) -> fl.FlightClient:
        """A Flight client of the node at `endpoint` (``host:port``)."""
        given: dict[str, Any] = {"generic_options": list(generic_options)}
        if self.tls:
            given |= {"tls_root_certs": self.ca, "cert_chain": self.certificate, "private_key": self.key}
        if self.token is not None or self.peer is not None:
            given["middleware"] = [_SendsHeaders(self)]
        return fl.FlightClient(self.location(endpoint), **given)


PLAIN: Final = Credentials()
"""Neither encryption nor a name."""


class _SendsHeaders(fl.ClientMiddlewareFactory):  # type: ignore[misc]  # pyarrow has no type hints
    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def start_call(self, info: Any) -> _Headers:
        headers = {}
        token = self._credentials.token
        if token is not None and (text := token()) is not None:
            headers[TOKEN_HEADER] = BEARER + text
        if self._credentials.peer is not None:
            headers[PEER_HEADER] = self._credentials.peer()
        return _Headers(headers)


class _Headers(fl.ClientMiddleware):  # type: ignore[misc]
    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers

    def sending_headers(self) -> dict[str, str]:
        return self._headers


ALSO: Final = b"also "
"""Begins the lines of a secret's file that have other secrets, whose proof is taken as well."""

SECRETS_MAX: Final = 4
"""Secrets that are known at a time."""

SECRETS_BYTES_MAX: Final = SECRETS_MAX * (SECRET_BYTES_MAX + 16)


@dataclass(frozen=True, slots=True)
class Tls:
    """A node's certificate and whom it trusts, all PEM."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    ca: bytes = field(repr=False)
    client_ca: bytes = field(default=b"", repr=False)
    client_certificates: bool = False
    peer_names: tuple[str, ...] = ()

    def server_options(self) -> Mapping[str, Any]:
        """Arguments of `pyarrow.flight.FlightServerBase`."""
        given: dict[str, Any] = {"tls_certificates": [(self.certificate, self.key)]}
        if self.client_certificates:
            given |= {"verify_client": True, "root_certificates": self.ca + b"\n" + self.client_ca}
        return given


@dataclass(frozen=True, slots=True)
class Security:
    """All that a node's files say. Without any it takes everybody."""

    tls: Tls | None = None
    tokens: TokenFile | None = None
    secret: Secret | None = field(default=None, repr=False)

    @property
    def scheme(self) -> str:
        """Of Flight locations of nodes with this security."""
        return "grpc" if self.tls is None else "grpc+tls"

    def relay_credentials(self) -> Credentials:
        """What this node brings when it calls another one on behalf of a client: nothing that gives it rights."""
        tls = self.tls
        return PLAIN if tls is None else Credentials(True, tls.ca, tls.certificate, tls.key)

    def peer_credentials(self, cluster_id: str, node_id: int) -> Credentials:
        """What this node brings when it opens streams of messages."""
        secret = self.secret
        peer = None if secret is None else lambda: secret.call(cluster_id, node_id)
        return replace(self.relay_credentials(), peer=peer)


OPEN: Final = Security()
"""Nothing is asked for."""


def read_security(config: SecurityConfig) -> Security:
    """Read all files of `config`.

    Raises
    ------
    UsageError
        If one cannot be read, or they do not fit each other; it names the file and never shows what is in it.
    """
    tls = None if config.tls is None else _read_tls(config.tls)
    tokens = None
    if config.tokens is not None:
        tokens = _read_tokens(config.tokens.file)
        if tokens.certificates and (tls is None or not tls.client_certificates):
            raise UsageError(
                f"{config.tokens.file}: [certificates] needs [node.tls] client_certificates = true: nobody shows one else"
            )
    secret = None if config.secret_file is None else _read_secret(config.secret_file)
    if tokens is not None and secret is None and (tls is None or not tls.client_certificates):
        raise UsageError(
            "[node.tokens] needs [node] secret_file or [node.tls] client_certificates = true: nodes bring no token, and "
            "whoever claims to be one would be believed"
        )
    return Security(tls, tokens, secret)


def files_of(config: SecurityConfig) -> list[Path]:
    """The files that `read_security` reads."""
    tls = config.tls
    files = [] if tls is None else [tls.certificate, tls.key, tls.ca, tls.client_ca]
    files += [config.secret_file, None if config.tokens is None else config.tokens.file]
    return [path for path in files if path is not None]


def _read(path: Path, what: str, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise UsageError(f"{path}: {what} cannot be read: {error.strerror or error}") from None
    if len(data) > bytes_max:
        raise UsageError(f"{path}: {what} has more than {bytes_max} bytes")
    return data


def _read_tls(config: TlsConfig) -> Tls:
    certificate = _read(config.certificate, "the certificate", PEM_BYTES_MAX)
    key = _read(config.key, "the key", PEM_BYTES_MAX)
    ca = read_ca(config.ca)
    client_ca = b"" if config.client_ca is None else read_ca(config.client_ca)
    check_pair(certificate, key, f"{config.certificate} and {config.key}")
    return Tls(certificate, key, ca, client_ca, config.client_certificates, tuple(config.peer_names))


def read_ca(path: Path) -> bytes:
    """The PEM file of a CA; UsageError if it is none."""
    pem = _read(path, "the CA's certificate", PEM_BYTES_MAX)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"{path}: no CA's certificate in PEM: {_reason(error)}") from None
    return pem


def read_pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """A certificate and its key; UsageError if they are none."""
    pems = _read(certificate, "the certificate", PEM_BYTES_MAX), _read(key, "the key", PEM_BYTES_MAX)
    check_pair(*pems, f"{certificate} and {key}")
    return pems


def check_pair(certificate: bytes, key: bytes, what: str) -> None:
    """Raise UsageError unless `key` is that of the first certificate in `certificate`."""
    with _named(certificate) as certificate_name, _named(key) as key_name:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate_name, key_name, password=_no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise UsageError(f"{what} are no certificate and its key: {_reason(error)}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted, and gRPC takes none that is: decrypt it, and protect the file")


@contextmanager
def _named(data: bytes) -> Iterator[str]:
    """A name under which OpenSSL can read `data`, in memory: what is checked must be what was read, and keys stay off disks."""
    descriptor = os.memfd_create("marble-pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return str(error.reason).replace("_", " ").lower()
    return "there is none" if isinstance(error, ssl.SSLError) else str(error)


def _read_tokens(path: Path) -> TokenFile:
    text = _read(path, "the file of tokens", FILE_BYTES_MAX)
    try:
        return parse_tokens(text.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a UTF-8 text file") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read_secret(path: Path) -> Secret:
    whole = _read(path, "the cluster's secret", SECRETS_BYTES_MAX).strip()
    first, *rest = whole.split(b"\n")
    # A secret may be of any bytes, so a file without such lines is one, whatever is in it.
    others = bool(rest) and all(line.startswith(ALSO) for line in rest)
    keys = [first.strip(), *(line.removeprefix(ALSO).strip() for line in rest)] if others else [whole]
    if any(not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX for key in keys):
        raise UsageError(
            f"{path}: a cluster's secret has {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes: "
            "make one with: head -c 32 /dev/urandom | base64"
        )
    if len(keys) > SECRETS_MAX:
        raise UsageError(
            f"{path}: {len(keys)} secrets, more than {SECRETS_MAX}: take out those that no node proves any more"
        )
    return Secret(keys[0], keys[1:])


def read_token(path: Path) -> str:
    """The token in a client's file: one line. UsageError if it cannot be one."""
    text = _read(path, "the token", FILE_BYTES_MAX)
    return check_token(text.decode("ascii", "replace").strip(), f"{path}: the token")
