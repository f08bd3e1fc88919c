"""Who a client is and what it may do: bearer tokens, and names of certificates, from a file that is read again.

The file is TOML. A table for each holder; its name is the one in logs::

    [tokens.etl]
    sha256 = "2bb8…"           # of the token; `marble token` prints both. Or: token = "…", 16 characters at least
    access = "write"           # read, write or admin; each includes the ones before
    tables = ["flights", "tmp_*"]     # all, if left out; * stands for any characters
    expires = 2027-01-31T00:00:00Z    # never, if left out

    [certificates.reports]
    name = "reports.example"   # first alternative name, or else the common name, of the client's certificate
    access = "read"

Rule 1: a token is compared with all of the file in constant time: digest with digest, without stopping at a match. Several holders
may be one client: so a token is replaced (add the new one, move the clients, remove the old one).
Rule 2: nothing here shows a token: neither ``repr`` nor any error.
"""

from __future__ import annotations

import datetime
import enum
import fnmatch
import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from marble.errors import ForbiddenError, UsageError

TOKEN_CHARACTERS_MIN: Final = 16
TOKEN_CHARACTERS_MAX: Final = 4096
HOLDERS_MAX: Final = 1024
"""Every call is compared with all of them."""
PATTERNS_MAX: Final = 256
FILE_BYTES_MAX: Final = 4 * 2**20

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_PATTERN = re.compile(r"[^\x00-\x1f]{1,255}")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Access(enum.IntEnum):
    """What a holder may do. Each includes the ones before."""

    READ = 1
    """Look at tables, their list, members, status, health."""
    WRITE = 2
    """Write and delete rows; propose operations."""
    ADMIN = 3
    """Create and drop tables; with all tables also what concerns nodes: members, leadership, snapshots, backups."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a call, and what it may do."""

    name: str
    access: Access
    tables: tuple[str, ...] = ("*",)
    expires: datetime.datetime | None = None

    def may(self, access: Access, table: str | None) -> bool:
        """Whether it may do `access` to `table`; None: to all of them; `ANYWHERE`: to some."""
        if access > self.access:
            return False
        if table == ANYWHERE:
            return True
        if table is None:
            return "*" in self.tables
        return any(fnmatch.fnmatchcase(table, pattern) for pattern in self.tables)

    def demand(self, access: Access, table: str | None) -> None:
        """Raise ForbiddenError unless it may."""
        if not self.may(access, table):
            what = f"{access.name.lower()} access" + (
                " to all tables" if table is None else f" to table {table[:255]!r}" if table else ""
            )
            mine = f"{self.access.name.lower()} access to " + ", ".join(self.tables[:8])
            raise ForbiddenError(f"{self.name!r} has {mine}, and this call needs {what}: ask the operator for it")

    def expired(self, now: datetime.datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires


ANYWHERE: Final = ""
"""In the place of a table's name: some table or other. No table has it."""

ANYONE: Final = Principal("anyone", Access.ADMIN)
"""Who calls a node that asks for nothing."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """What a file of tokens says.

    Parameters
    ----------
    tokens
        SHA-256 of each token with its holder.
    certificates
        Holder by name of the certificate.
    """

    tokens: Sequence[tuple[bytes, Principal]] = field(default=(), repr=False)
    certificates: Mapping[str, Principal] = field(default_factory=dict)

    def find(self, token: str, now: datetime.datetime) -> Principal | None:
        """The holder of `token`; None if nobody has it, or only one whose time is over."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        found: Principal | None = None
        for other, principal in self.tokens:
            if hmac.compare_digest(digest, other):
                found = principal
        return None if found is None or found.expired(now) else found

    def find_certificate(self, name: str, now: datetime.datetime) -> Principal | None:
        """The holder whose certificate has this name."""
        found = self.certificates.get(name)
        return None if found is None or found.expired(now) else found


def parse_tokens(text: str) -> TokenFile:
    """Read the text of a file of tokens.

    Raises
    ------
    UsageError
        Naming the holder and the key; never the token.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # The text of a TOML error has a line and a column, and nothing of what stands there. A number of thousands of digits
        # has an error of its own.
        raise UsageError(f"not valid TOML: {error}") from None
    for key in tables:
        if key not in ("tokens", "certificates"):
            raise UsageError(f"unknown key {key[:80]!r}: there are [tokens.NAME] and [certificates.NAME]")
    tokens = []
    digests: dict[bytes, str] = {}
    for name, entry in _holders(tables, "tokens"):
        digest = _digest_of(name, entry)
        if digest in digests:
            raise UsageError(f"[tokens.{name}] has the token of [tokens.{digests[digest]}]: each needs its own")
        digests[digest] = name
        tokens.append((digest, _principal(f"tokens.{name}", name, entry)))
    certificates = {}
    for name, entry in _holders(tables, "certificates"):
        wanted = entry.pop("name", None)
        if not isinstance(wanted, str) or not 1 <= len(wanted) <= 255 or wanted in certificates:
            raise UsageError(f"[certificates.{name}] needs a 'name' of its own: the one in the client's certificate")
        certificates[wanted] = _principal(f"certificates.{name}", name, entry)
    return TokenFile(tuple(tokens), certificates)


def _holders(tables: Mapping[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
    holders = tables.get(kind, {})
    if not isinstance(holders, dict) or len(holders) > HOLDERS_MAX:
        raise UsageError(f"[{kind}] must hold at most {HOLDERS_MAX} tables [{kind}.NAME]")
    for name, entry in holders.items():
        if _NAME.fullmatch(name) is None or not isinstance(entry, dict):
            raise UsageError(f"[{kind}.{name[:64]}] must be a table whose name has 1 to 64 letters, digits, _ . @ or -")
    return [(name, dict(entry)) for name, entry in holders.items()]


def _digest_of(name: str, entry: dict[str, Any]) -> bytes:
    if ("token" in entry) == ("sha256" in entry):
        raise UsageError(f"[tokens.{name}] needs one of 'sha256' and 'token'")
    if "sha256" in entry:
        digest = entry.pop("sha256")
        if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
            raise UsageError(f"[tokens.{name}] sha256 must be 64 hexadecimal digits")
        return bytes.fromhex(digest)
    return hashlib.sha256(check_token(entry.pop("token"), f"[tokens.{name}] token").encode()).digest()


def check_token(token: object, what: str) -> str:
    """`token`, if it can be one; else a UsageError that does not show it."""
    if not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
        raise UsageError(f"{what} must be printable ASCII characters without spaces")
    if not TOKEN_CHARACTERS_MIN <= len(token) <= TOKEN_CHARACTERS_MAX:
        raise UsageError(f"{what} must have {TOKEN_CHARACTERS_MIN} to {TOKEN_CHARACTERS_MAX} characters")
    return token


def _principal(where: str, name: str, entry: dict[str, Any]) -> Principal:
    for key in entry:
        if key not in ("access", "tables", "expires"):
            raise UsageError(f"unknown key {key[:80]!r} in [{where}]: it knows access, tables and expires")
    names = {access.name.lower(): access for access in Access}
    access = entry.get("access")
    if not isinstance(access, str) or access not in names:
        raise UsageError(f"[{where}] access must be one of {', '.join(names)}")
    tables = entry.get("tables", ["*"])
    good = isinstance(tables, list) and 1 <= len(tables) <= PATTERNS_MAX
    if not good or not all(isinstance(each, str) and _PATTERN.fullmatch(each) for each in tables):
        raise UsageError(
            f"[{where}] tables must be a list of 1 to {PATTERNS_MAX} names, in which * stands for anything"
        )
    expires = entry.get("expires")
    if expires is not None and (not isinstance(expires, datetime.datetime) or expires.tzinfo is None):
        raise UsageError(f"[{where}] expires must be a date and time with its zone, such as 2027-01-31T00:00:00Z")
    return Principal(name, names[access], tuple(tables), expires)
