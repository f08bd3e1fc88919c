"""What a client brings, gathered from arguments, and where these say nothing, from the environment.

===================  ===============================================================
variable             file
===================  ===============================================================
MARBLE_TOKEN_FILE    the bearer token, one line; read again when it changes
MARBLE_CA            PEM: who signs the nodes' certificates
MARBLE_CERT          PEM: the client's certificate, with the chain up to its CA
MARBLE_KEY           PEM: the key of it
===================  ===============================================================

A token itself is never taken from the environment: other processes of the user could read it there.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

from marble.config import is_tls, parse_url
from marble.errors import UsageError
from marble.transport.security import Credentials, read_ca, read_pair, read_token
from marble.transport.tokens import check_token

TOKEN_FILE: Final = "MARBLE_TOKEN_FILE"
CA: Final = "MARBLE_CA"
CERTIFICATE: Final = "MARBLE_CERT"
KEY: Final = "MARBLE_KEY"

_log = logging.getLogger("marble.client")

_Name = str | os.PathLike[str] | None


class TokenFile:
    """The token in a file, read again when the file changes. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: tuple[object, str] = self._read()

    def _read(self) -> tuple[object, str]:
        return self._stamp(), read_token(self._path)

    def _stamp(self) -> object:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def token(self) -> str:
        """The token of now; while the file is missing or no token, the one before."""
        stamp, token = self._known
        if self._stamp() != stamp:
            try:
                self._known = self._read()
                token = self._known[1]
            except UsageError as error:
                _log.warning("the token stays as it was: %s", error)
                self._known = self._stamp(), token
        return token


def credentials_for(
    url: str,
    token: str | None = None,
    token_file: _Name = None,
    tls_ca: _Name = None,
    tls_cert: _Name = None,
    tls_key: _Name = None,
) -> Credentials:
    """What to bring to the cluster at `url`; the rest as in `marble.connect`.

    Raises
    ------
    UsageError
        If files are missing, do not fit each other, or belong to encrypted connections and `url` is not one.
    """
    parse_url(url)
    if token is not None and token_file is not None:
        raise UsageError("give a token or a token_file, not both")
    found = None if token is not None else _file(token_file, TOKEN_FILE)
    bearer = None
    if token is not None:
        text = check_token(token, "the token")
        bearer = lambda: text  # noqa: E731  (what a file gives is a function, too)
    elif found is not None:
        bearer = TokenFile(found).token
    if not is_tls(url):
        if (tls_ca, tls_cert, tls_key) != (None, None, None):
            raise UsageError(
                f"{url!r} is not encrypted, so that certificates are of no use: write grpc+tls://host:port"
            )
        if bearer is not None:
            _log.warning(
                "the token travels unencrypted to %s: whoever sits on the way can take it; use grpc+tls://", url
            )
        return Credentials(token=bearer)
    ca, certificate, key = _file(tls_ca, CA), _file(tls_cert, CERTIFICATE), _file(tls_key, KEY)
    if (certificate is None) != (key is None):
        raise UsageError(
            "a client's certificate and its key belong together: tls_cert and tls_key, or --cert and --key"
        )
    mine, mine_key = (None, None) if certificate is None or key is None else read_pair(certificate, key)
    return Credentials(True, None if ca is None else read_ca(ca), mine, mine_key, token=bearer)


def _file(given: _Name, variable: str) -> Path | None:
    name = given if given is not None else os.environ.get(variable)
    return Path(name) if name else None
