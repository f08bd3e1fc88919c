"""What gRPC says of a connection that failed for its encryption, in words that tell who, why and what to do.

gRPC's texts name the address and OpenSSL's reason, and are found here by the reason. What is not found stays as gRPC says it.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import Final

_ADDRESS = re.compile(r"ipv[46]:(\S+?:\d+):")

_REASONS: Final = (
    (
        ("unable to get local issuer certificate", "self-signed certificate", "self signed certificate"),
        "its certificate is signed by nobody who is trusted here: give the CA of the cluster "
        "(connect(..., tls_ca=...), --ca, MARBLE_CA; at a node [node.tls] ca)",
    ),
    (
        ("certificate has expired",),
        "its certificate has expired: put a new one into the file that [node.tls] certificate names there; it is read without a restart",
    ),
    (
        ("not yet valid",),
        "its certificate is not valid yet, or the clock of this machine is behind: compare the clocks",
    ),
    (
        ("is not in peer certificate",),
        "its certificate does not name the host by which it was called: call it by a name that stands there, or give it a certificate "
        "with this one (marble certs --node NAME,NAME)",
    ),
    (
        ("wrong version number",),
        "it speaks without encryption, and this side with: use grpc://, or turn it on there ([cluster] enable_ssl, [node.tls])",
    ),
    (
        ("Socket closed", "recvmsg:Connection reset by peer"),
        "it took the connection and closed it at once: it may want encryption (grpc+tls://), or a certificate that its CA has signed "
        "(connect(..., tls_cert=..., tls_key=...), --cert and --key)",
    ),
)


def explain(text: str) -> str | None:
    """What the text of an error of gRPC's means, if it is about a connection that could not be set up; None for any other."""
    if "failed to connect to all addresses" not in text:
        return None
    for signs, words in _REASONS:
        if any(sign in text for sign in signs):
            found = _ADDRESS.search(text)
            return f"{urllib.parse.unquote(found[1]) if found else 'the node'}: {words}"
    return None
