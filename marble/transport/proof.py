"""How nodes prove to each other that they know the cluster's secret, without ever sending it.

The secret is the key of HMAC-SHA256, nothing else is made of it. Three proofs, each over words of its own, so that none can be
taken for another (no reflection), and each of the last two over a number that the other side has just drawn (no replay):

==========  ======================================================================================================
what        bytes
==========  ======================================================================================================
call        gRPC header ``marble-peer`` of every stream between nodes, ASCII: ``1;NODE;NONCE;MAC``: decimal id, 32 and 64
            hex digits. MAC = HMAC(secret, "marble.peer/1 call" 00 cluster_id 00 u64 NODE, 16 bytes NONCE). It says that the
            caller once knew the secret: enough for the server to read what follows, and for nothing else.
hello       after the hello's own bytes: "MRBP", u8 1, 3 zero bytes, 16 random bytes C. 24 bytes.
answer      after the answer's own bytes: "MRBP", u8 2, 3 zero bytes, 16 random bytes S, 32 bytes
            HMAC(secret, "marble.peer/1 callee" 00 C S D). 56 bytes.
last word   alone, before the first packet: "MRBP", u8 3, 3 zero bytes, 32 bytes
            HMAC(secret, "marble.peer/1 caller" 00 S C D). 40 bytes.
==========  ======================================================================================================

D = SHA-256 of (u64 length of the hello, the hello, the answer), both without what is added here; they name the cluster, who calls and
who is called. All integers are little endian.

Rule 1: whoever calls sends no packet before it has checked the answer; whoever is called hands none on before the last word.
Rule 2: MACs are compared in constant time, and no error says in what a wrong one differs.

What this does not do: it protects the opening of a stream, not the stream. Who sits on the path of unencrypted connections can
read them and take them over; against that there is TLS.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from typing import Final

from marble.errors import ProtocolError

PEER_HEADER: Final = "marble-peer"
"""gRPC header: the proof of a call."""

SECRET_BYTES_MIN: Final = 32
"""Whoever is called by a stranger answers with a MAC: a shorter secret could be found by trying."""

SECRET_BYTES_MAX: Final = 4096

_MAGIC: Final = b"MRBP"
_HEAD: Final = struct.Struct("<4sB3x")
_NONCE: Final = 16
_MAC: Final = 32
_HELLO, _ANSWER, _LAST = 1, 2, 3
_SIZES: Final = {_HELLO: _NONCE, _ANSWER: _NONCE + _MAC, _LAST: _MAC}
_CALL: Final = b"marble.peer/1 call\0"
_CALLEE: Final = b"marble.peer/1 callee\0"
_CALLER: Final = b"marble.peer/1 caller\0"


def _sealed(kind: int, body: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, kind) + body


def _opened(data: bytes, kind: int) -> bytes | None:
    """The body of proof `kind`, if `data` is one."""
    whole = len(data) == _HEAD.size + _SIZES[kind] and data[: _HEAD.size] == _HEAD.pack(_MAGIC, kind)
    return data[_HEAD.size :] if whole else None


def split(data: bytes, kind_of_answer: bool) -> tuple[bytes, bytes]:
    """A hello (or an answer to one) and the proof behind it, which is empty if there is none."""
    kind = _ANSWER if kind_of_answer else _HELLO
    at = len(data) - _HEAD.size - _SIZES[kind]
    if at > 0 and _opened(data[at:], kind) is not None:
        return data[:at], data[at:]
    return data, b""


class Secret:
    """The cluster's secret. It never shows: neither ``repr`` nor any error has it.

    Parameters
    ----------
    key
        `SECRET_BYTES_MIN` to `SECRET_BYTES_MAX` bytes: what this node proves that it knows.
    also
        Others, whose proof is taken as well, while one secret takes the place of another.
    """

    __slots__ = ("_key", "_known")

    def __init__(self, key: bytes, also: Sequence[bytes] = ()) -> None:
        for each in (key, *also):
            if not SECRET_BYTES_MIN <= len(each) <= SECRET_BYTES_MAX:
                raise ValueError(f"a cluster's secret must have {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes")
        self._key = key
        self._known = (key, *also)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret) or len(self._known) != len(other._known):
            return False
        return all(hmac.compare_digest(*pair) for pair in zip(self._known, other._known, strict=True))

    def __hash__(self) -> int:
        return hash(Secret)

    def __reduce__(self) -> str:
        raise TypeError("a secret is not written down")

    def mac(self, words: bytes, *parts: bytes) -> bytes:
        """HMAC-SHA256 over `words` and `parts`."""
        return _mac(self._key, words, *parts)

    def knows(self, mac: bytes, words: bytes, *parts: bytes) -> bool:
        """Whether `mac` is that of `words` and `parts` under any of the secrets that are known here. Takes as long if it is of none."""
        return sum(hmac.compare_digest(_mac(key, words, *parts), mac) for key in self._known) > 0

    def call(self, cluster_id: str, node: int) -> str:
        """A proof for the header `PEER_HEADER`."""
        nonce = os.urandom(_NONCE)
        return f"1;{node};{nonce.hex()};{self.mac(_CALL, *_call_parts(cluster_id, node, nonce)).hex()}"

    def check_call(self, cluster_id: str, header: str) -> int | None:
        """The node that sent `header`; None if that is no proof."""
        parts = header.split(";")
        if len(header) > 256 or len(parts) != 4 or parts[0] != "1" or not parts[1].isascii() or not parts[1].isdigit():
            return None
        node = int(parts[1])
        if node >= 2**64:
            return None
        try:
            nonce, mac = bytes.fromhex(parts[2]), bytes.fromhex(parts[3])
        except ValueError:
            return None
        good = self.knows(mac, _CALL, *_call_parts(cluster_id, node, nonce))
        return node if good and len(nonce) == _NONCE else None


def _mac(key: bytes, words: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, words + b"".join(parts), hashlib.sha256).digest()


def _call_parts(cluster_id: str, node: int, nonce: bytes) -> tuple[bytes, ...]:
    return cluster_id.encode(), b"\0", struct.pack("<Q", node), nonce


def _digest(hello: bytes, answer: bytes) -> bytes:
    return hashlib.sha256(struct.pack("<Q", len(hello)) + hello + answer).digest()


class CallerProof:
    """The part of whoever opens a stream; one for each stream.

    Parameters
    ----------
    secret
        None: nothing is proved, and nothing is asked for.
    """

    def __init__(self, secret: Secret | None) -> None:
        self._secret = secret
        self._nonce = os.urandom(_NONCE)
        self._hello = b""

    def hello(self, hello: bytes) -> bytes:
        """What to send in place of `hello`."""
        self._hello = hello
        return hello if self._secret is None else hello + _sealed(_HELLO, self._nonce)

    def check_answer(self, data: bytes, who: str) -> tuple[bytes, bytes | None]:
        """The answer to the hello, and the last word to send, if any.

        Raises
        ------
        ProtocolError
            The other node does not know the secret, or this one has none and the other has.
        """
        answer, proof = split(data, True)
        if self._secret is None:
            return answer, None
        body = _opened(proof, _ANSWER) if proof else None
        if body is None:
            raise ProtocolError(f"{who} has no cluster secret, and this one has: give both the same secret_file")
        nonce, mac = body[:_NONCE], body[_NONCE:]
        digest = _digest(self._hello, answer)
        if not self._secret.knows(mac, _CALLEE, self._nonce, nonce, digest):
            raise ProtocolError(f"{who} has another cluster secret than this one: give both the same secret_file")
        return answer, _sealed(_LAST, self._secret.mac(_CALLER, nonce, self._nonce, digest))


class CalleeProof:
    """The part of whoever is called; one for each stream."""

    def __init__(self, secret: Secret | None) -> None:
        self._secret = secret
        self._nonce = os.urandom(_NONCE)
        self._theirs = b""
        self._hello = b""
        self._digest: bytes | None = None

    def take_hello(self, data: bytes) -> bytes:
        """The hello in `data`. Raises ProtocolError unless it asks for a proof where there must be one, and only there."""
        hello, proof = split(data, False)
        if (self._secret is None) != (not proof):
            has, lacks = ("this node", "the caller") if self._secret is not None else ("the caller", "this node")
            raise ProtocolError(f"{has} has a cluster secret and {lacks} has none: give all nodes the same secret_file")
        self._hello = hello
        if proof:
            self._theirs = _opened(proof, _HELLO) or b""
        return hello

    def answer(self, answer: bytes) -> bytes:
        """What to send in place of `answer`."""
        if self._secret is None:
            return answer
        self._digest = digest = _digest(self._hello, answer)
        return answer + _sealed(_ANSWER, self._nonce + self._secret.mac(_CALLEE, self._theirs, self._nonce, digest))

    @property
    def needed(self) -> bool:
        """Whether the caller must prove that it knows the secret: its last word comes right after the answer."""
        return self._secret is not None

    def check_last_word(self, data: bytes) -> None:
        """Raises ProtocolError unless `data` is the caller's proof."""
        digest, self._digest = self._digest, None
        mac = _opened(data, _LAST)
        if (
            self._secret is None
            or digest is None
            or mac is None
            or not self._secret.knows(mac, _CALLER, self._nonce, self._theirs, digest)
        ):
            raise ProtocolError("the caller does not know the cluster secret: give all nodes the same secret_file")
