"""TLS at a port: whether there is any, whether its certificate can be trusted, and whether it trusts ours.

Everything is asked of OpenSSL through `ssl`: a handshake without checks shows that there is TLS; one with checks, what is wrong; one
with all checks but that one, what the certificate says instead.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from marble.doctor.findings import Notes
from marble.doctor.reach import PREFACE, Address, is_http2, listen_to, open_socket
from marble.errors import UsageError

_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_NAMES: Final = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH and IP_ADDRESS_MISMATCH of OpenSSL."""

_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME."""

SOON_DAYS: Final = 14.0
"""A certificate that ends within so many days is worth a warning."""


@dataclass(frozen=True, slots=True)
class Papers:
    """What is shown to a node and what its answer is checked with. A token is read from its file when it is needed.

    - ``ca``: certificates (PEM) to trust; None: those of the system.
    - ``certificate``, ``key``: this side's own (PEM); both or neither.
    - ``server_name``: the name to expect in the certificate, if it is not the host's.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise UsageError("a certificate and its key belong together: give --cert and --key")
        for path in (self.ca, self.certificate, self.key, self.token_file):
            if path is not None and not path.is_file():
                raise UsageError(f"{path}: no such file")

    def token(self) -> str | None:
        """The bearer token, if there is a file of one: its first line that is not empty."""
        if self.token_file is None:
            return None
        for line in self.token_file.read_text().splitlines():
            if line.strip():
                return line.strip()
        raise UsageError(f"{self.token_file}: it has no token")

    def context(self) -> ssl.SSLContext:
        """A context that checks everything. Raises UsageError if a file is not what it should be."""
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            if self.certificate is not None and self.key is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as error:
            names = ", ".join(str(each) for each in (self.ca, self.certificate, self.key) if each is not None)
            raise UsageError(f"the TLS files cannot be used ({names}): {error}") from None
        context.set_alpn_protocols(["h2"])
        return context


def speaks_tls(address: Address, timeout_s: float) -> bool:
    """Whether a TLS handshake succeeds, nothing checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with open_socket(address, timeout_s) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        # A peer that insists on our certificate has shown that it speaks TLS.
        return "ALERT" in (error.reason or "") and "WRONG_VERSION" not in (error.reason or "")
    except OSError:
        return False


def check_tls(notes: Notes, address: Address, host: str, papers: Papers, timeout_s: float) -> bool:
    """Check what can be checked of the TLS at `address`; whether a client with these `papers` gets through."""
    name = papers.server_name or host
    try:
        with (
            open_socket(address, timeout_s) as plain,
            papers.context().wrap_socket(plain, server_hostname=name) as connection,
        ):
            version, certificate = connection.version(), connection.getpeercert() or {}
            # Whether the server takes our certificate, or the lack of one, shows only when it answers (TLS 1.3). Servers of gRPC
            # speak first, and what is sent to one that has closed would wipe out what it said.
            answer = listen_to(connection, timeout_s / 2)
            if answer is None:
                connection.sendall(PREFACE)
                answer = listen_to(connection, timeout_s)
    except ssl.SSLCertVerificationError as error:
        _explain(notes, error, address, name, papers, timeout_s)
        return False
    except ssl.SSLError as error:
        _explain_alert(notes, error, papers)
        return False
    except OSError as error:
        if papers.certificate is None:
            _want_certificate(notes)
        else:
            notes.problem("tls", f"the connection broke in the handshake: {error}", "look in the log of the node")
        return False
    if answer is None or not is_http2(answer):
        notes.problem(
            "speech", "TLS, and behind it something that is not a Flight port", "check the port: is it the node's?"
        )
        return False
    notes.good("tls", f"{version}, certificate for {', '.join(_names(certificate)) or 'no name'}")
    _check_end(notes, certificate)
    return True


def _check_end(notes: Notes, certificate: dict[str, Any]) -> None:
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    if days < SOON_DAYS:
        notes.warn(
            "tls-time",
            f"the certificate ends in {days:.1f} days ({certificate['notAfter']})",
            "renew it; a node takes the new files without a restart",
        )


def _explain(
    notes: Notes, error: ssl.SSLCertVerificationError, address: Address, name: str, papers: Papers, timeout_s: float
) -> None:
    """Say what is wrong with the server's certificate."""
    code = error.verify_code
    if code in _NAMES:
        names = ", ".join(_names(_look(address, papers, timeout_s, names=False))) or "no name at all"
        notes.problem(
            "tls-name",
            f"the certificate is not for {name!r}: it is for {names}",
            f"make a certificate that names {name!r}, connect by a name that it has, or give --server-name",
        )
    elif code in (_EXPIRED, _NOT_YET_VALID):
        certificate = _look(address, papers, timeout_s, names=False, times=False)
        if code == _EXPIRED:
            words = f"the certificate has expired ({certificate.get('notAfter', 'when is not known')})"
            advice = "renew it; a node takes the new files without a restart"
        else:
            words = f"the certificate is not valid yet ({certificate.get('notBefore', 'when is not known')})"
            advice = "compare the clocks of this machine and of the one that made it, or wait"
        notes.problem("tls-time", words, advice)
    else:
        trusted = "the CAs of this system" if papers.ca is None else str(papers.ca)
        notes.problem(
            "tls-ca",
            f"the certificate is not signed by a CA of {trusted} ({error.verify_message})",
            "give the cluster's CA with --ca; if you did, the node has a certificate of another one",
        )


def _explain_alert(notes: Notes, error: ssl.SSLError, papers: Papers) -> None:
    reason = error.reason or str(error)
    silent = "HANDSHAKE_FAILURE" in reason or isinstance(error, ssl.SSLEOFError)
    if "CERTIFICATE_REQUIRED" in reason or (papers.certificate is None and silent):
        _want_certificate(notes)
    elif papers.certificate is not None and ("UNKNOWN_CA" in reason or "BAD_CERTIFICATE" in reason):
        notes.problem(
            "tls-client",
            "the node does not trust the client's certificate: it is of another CA",
            "give a certificate that is signed by the node's [node.tls] client CA",
        )
    elif "CERTIFICATE_EXPIRED" in reason:
        notes.problem("tls-client", "the client's own certificate has expired", "renew the one given with --cert")
    else:
        notes.problem("tls", f"the TLS handshake fails: {reason}", "look in the log of the node for its side of it")


def _want_certificate(notes: Notes) -> None:
    notes.problem(
        "tls-client",
        "the node wants a certificate of its clients (mutual TLS)",
        "give one with --cert and --key, signed by the CA that the node trusts",
    )


def _look(address: Address, papers: Papers, timeout_s: float, *, names: bool, times: bool = True) -> dict[str, Any]:
    """The server's certificate, read with some checks left out; empty if even that fails."""
    context = papers.context()
    context.check_hostname = names
    if not times:
        context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
    try:
        with open_socket(address, timeout_s) as plain, context.wrap_socket(plain) as connection:
            return dict(connection.getpeercert() or {})
    except (OSError, ValueError):
        return {}


def _names(certificate: dict[str, Any]) -> list[str]:
    return [str(name) for _, name in certificate.get("subjectAltName", ())]
