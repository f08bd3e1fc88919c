"""The commands ``marble certs`` and ``marble token``: a CA and certificates for a trial, and tokens for clients.

The CA's key lies unencrypted beside its certificate. That is fit for a trial and for tests; where a CA exists already, let that one sign,
with what `issue` asks for: the host under which others find the node among the alternative names, and the usages below.

Rule 1: nothing that exists is overwritten; keys, the secret and tokens are readable by their owner only, from their first byte on.
Rule 2: a node's certificate may serve and call, a client's may only call: who has one of those cannot pose as a node to others.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import hashlib
import ipaddress
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from marble.config import parse_endpoint
from marble.errors import UsageError
from marble.transport.tokens import Access, parse_tokens

DAYS: Final = 365
DAYS_MAX: Final = 3650
CA_DAYS: Final = 3650
BACKDATED: Final = datetime.timedelta(minutes=5)
"""Clocks of other machines may be a little behind."""

SECRET_BYTES: Final = 32
TOKEN_BYTES: Final = 32


def make_authority(name: str, *, days: int = CA_DAYS) -> tuple[bytes, bytes]:
    """A new CA called `name`: its certificate and its key, PEM."""
    x509, _, ec = _cryptography()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
    )
    return _pems(builder, key, key)


def issue(
    authority: tuple[bytes, bytes], names: Sequence[str], *, serves: bool, days: int = DAYS, begins_days: int = 0
) -> tuple[bytes, bytes]:
    """A certificate that `authority` signs, and its key, PEM.

    Parameters
    ----------
    authority
        What `make_authority` gave.
    names
        Host names and IP addresses, or names of a client; the first is the one that ``peer_names`` and ``[certificates]`` mean.
    serves
        Whether its holder is a node, which others connect to.
    days, begins_days
        For how long, and from when on, from now.

    Raises
    ------
    UsageError
        If the extra is not installed, or `authority` is none.
    """
    x509, serialization, ec = _cryptography()
    try:
        signer = x509.load_pem_x509_certificate(authority[0])
        signing = serialization.load_pem_private_key(authority[1], None)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the CA's certificate and key cannot be read: {error}") from None
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0][:64])])
    usages = [x509.ExtendedKeyUsageOID.CLIENT_AUTH] + ([x509.ExtendedKeyUsageOID.SERVER_AUTH] if serves else [])
    builder = (
        _builder(subject, signer.subject, key.public_key(), days, begins_days)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    return _pems(builder, key, signing)


def _cryptography() -> Any:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise UsageError(
            "certificates are made by the package cryptography, which is not here: pip install 'marbledb[server]'"
        ) from None
    return x509, serialization, ec


def _builder(subject: Any, issuer: Any, public: Any, days: int, begins_days: int = 0) -> Any:
    x509, _, _ = _cryptography()
    begins = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=begins_days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - BACKDATED)
        .not_valid_after(begins + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _key_usage(*, signs: bool) -> Any:
    x509, _, _ = _cryptography()
    off = (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(digital_signature=True, key_cert_sign=signs, crl_sign=signs, **dict.fromkeys(off, False))


def _alternative(name: str) -> Any:
    x509, _, _ = _cryptography()
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pems(builder: Any, key: Any, signing: Any) -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives import hashes, serialization

    certificate = builder.sign(signing, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private


# -- commands ----------------------------------------------------------------------------------------------------------


def add_certs_commands(commands: Any) -> None:
    """Add the two to `commands`."""
    certs = commands.add_parser(
        "certs",
        help="make a CA and certificates for a trial",
        description="Make certificates in DIR, for a trial: ca.pem and ca.key, once; cluster.secret, once; NAME.pem and NAME.key for each "
        "--node and --client. What is there already is used, and never overwritten.",
    )
    certs.add_argument("directory", type=Path, metavar="DIR", help="where to put them, and where a CA may be already")
    certs.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="HOST[,HOST]",
        help="a node, by the names and addresses under which others find it",
    )
    certs.add_argument("--client", action="append", default=[], metavar="NAME", help="a client")
    certs.add_argument("--days", type=int, default=DAYS, metavar="N", help="how long they hold (default: %(default)s)")
    certs.add_argument("--name", default="marble trial CA", help="of a new CA (default: %(default)s)")
    certs.set_defaults(command=_certs)
    token = commands.add_parser(
        "token",
        help="make a bearer token for a client",
        description="Add a holder to a file of tokens (its SHA-256 only), and print the token, which is nowhere else from then on.",
    )
    token.add_argument("file", type=Path, metavar="FILE", help="the nodes' file of tokens; made if missing")
    token.add_argument("name", metavar="NAME", help="of the holder, for the log")
    token.add_argument("--access", choices=[each.name.lower() for each in Access], required=True)
    token.add_argument("--table", action="append", metavar="PATTERN", help="which tables (default: all)")
    token.add_argument("--days", type=int, metavar="N", help="how long it holds (default: for ever)")
    token.set_defaults(command=_token)


def _certs(options: argparse.Namespace) -> int:
    directory: Path = options.directory
    if not 1 <= options.days <= DAYS_MAX:
        raise UsageError(f"--days {options.days}: it must be 1 to {DAYS_MAX}")
    wanted = [(_hosts(text), True) for text in options.node] + [([_plain(name)], False) for name in options.client]
    for (first, *_), _serves in wanted:
        for path in (directory / f"{first}.pem", directory / f"{first}.key"):
            if path.exists():
                raise UsageError(f"{path} exists: delete it first, if it is to be replaced")
    directory.mkdir(parents=True, exist_ok=True)
    ca, ca_key = directory / "ca.pem", directory / "ca.key"
    if ca.exists() != ca_key.exists():
        raise UsageError(f"{directory} has one of ca.pem and ca.key: a CA needs both")
    if not ca.exists():
        certificate, key = make_authority(options.name)
        _write(ca, certificate, 0o644)
        _write(ca_key, key, 0o600)
    authority = ca.read_bytes(), ca_key.read_bytes()
    secret = directory / "cluster.secret"
    if not secret.exists():
        _write(secret, base64.b64encode(secrets.token_bytes(SECRET_BYTES)) + b"\n", 0o600)
    for names, serves in wanted:
        certificate, key = issue(authority, names, serves=serves, days=options.days)
        _write(directory / f"{names[0]}.key", key, 0o600)
        _write(directory / f"{names[0]}.pem", certificate, 0o644)
        print(f"{directory / names[0]}.pem: {'node' if serves else 'client'} {', '.join(names)}, {options.days} days")
    return 0


def _hosts(text: str) -> list[str]:
    names = [name.strip().strip("[]") for name in text.split(",")]
    for name in names:
        parse_endpoint(f"[{name}]:1" if ":" in name else f"{name}:1", what="--node")
    return names


def _plain(name: str) -> str:
    parse_endpoint(f"{name}:1", what="--client")
    return name


def _write(path: Path, data: bytes, mode: int) -> None:
    # Its mode is there before its content is.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def _token(options: argparse.Namespace) -> int:
    path: Path = options.file
    before = path.read_text() if path.exists() else ""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    lines = [f"[tokens.{options.name}]" if options.name.isalnum() else f'[tokens."{options.name}"]']
    lines.append(f'sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"')
    lines.append(f'access = "{options.access}"')
    if options.table:
        lines.append("tables = [" + ", ".join(_quoted(each) for each in options.table) + "]")
    if options.days is not None:
        if not 1 <= options.days <= DAYS_MAX:
            raise UsageError(f"--days {options.days}: it must be 1 to {DAYS_MAX}")
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=options.days)
        lines.append(f"expires = {ends:%Y-%m-%dT%H:%M:%SZ}")
    text = (before.rstrip() + "\n\n" if before.strip() else "") + "\n".join(lines) + "\n"
    # Nothing is written that the nodes would refuse: a name that is taken, a pattern that is none.
    parse_tokens(text)
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    _write(fresh, text.encode(), 0o600)
    fresh.replace(path)
    print(token)
    return 0


def _quoted(text: str) -> str:
    if not text.isprintable() or '"' in text or "\\" in text:
        raise UsageError(f"--table {text!r} is not the pattern of a name")
    return f'"{text}"'


# -- what other commands bring ------------------------------------------------------------------------------------------

_PAPERS: Final = (
    ("--token-file", "token_file", "MARBLE_TOKEN_FILE", "a file with your token"),
    ("--ca", "ca", "MARBLE_CA", "certificates to trust (PEM)"),
    ("--cert", "cert", "MARBLE_CERT", "your own certificate (PEM)"),
    ("--key", "key", "MARBLE_KEY", "and its key"),
)


def add_papers_options(commands: Any) -> None:
    """Add the options that say who calls to each of `commands` that calls a cluster."""
    for parser in commands.choices.values():
        known = {action.dest for action in parser._actions}
        if known & {"url", "source"}:
            for option, destination, variable, what in _PAPERS:
                if destination not in known:
                    parser.add_argument(option, type=Path, metavar="FILE", help=f"{what}; or {variable}")


@contextlib.contextmanager
def papers(options: argparse.Namespace) -> Iterator[None]:
    """Let `marble.transport.papers` find what the options name, and options what the environment names.

    What the options name is in the process's environment for as long as the command runs, and no longer: who calls
    `marble.cli.main` from a program of their own finds it as it was.
    """
    before: dict[str, str | None] = {}
    for _, destination, variable, _ in _PAPERS:
        given = getattr(options, destination, None)
        if isinstance(given, Path):
            before[variable] = os.environ.get(variable)
            os.environ[variable] = str(given)
        elif given is None and hasattr(options, destination) and os.environ.get(variable):
            setattr(options, destination, Path(os.environ[variable]))
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
