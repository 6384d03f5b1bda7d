"""Who may come to a side of the buffer: login and issuer of the peer's certificate against a list of those allowed.

An issuer we trust has proved who the peer is; this decides whether the stream is his. It is decided right after the TLS
handshake, before the first byte of a protocol: who is turned away learns nothing and gives nothing.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from cryptography import x509
from cryptography.x509.oid import NameOID

from nngstream.config import Allowed
from nngstream.errors import NotAllowedError, WireError
from nngstream.handshake import Side

_DOES: dict[Side, tuple[str, str]] = {"in": ("push", "tls.producers"), "out": ("pull", "tls.consumers")}


def identity(der: bytes) -> tuple[str, str]:
    """Login and issuer of a certificate (DER).

    The login is the subject's user id (UID), else its common name, as the services read it
    (``lclstream/security/identity.py``; a test holds the two together); the issuer is in the form of RFC 4514.

    Raises:
        WireError: it is no certificate, or names nobody.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        issuer = certificate.issuer.rfc4514_string()
        for attribute in (NameOID.USER_ID, NameOID.COMMON_NAME):
            values = certificate.subject.get_attributes_for_oid(attribute)
            if values:
                return str(values[0].value), issuer
    except ValueError as error:
        raise WireError(f"its certificate cannot be read: {error}") from error
    raise WireError(f"its certificate, issued by {issuer}, has neither UID nor CN: it names nobody")


def admit(sock: ssl.SSLSocket, side: Side, allowed: Sequence[Allowed]) -> None:
    """Let a peer in, or not; its TLS handshake must be done.

    Raises:
        NotAllowedError: nobody of that login and issuer is in the list.
        WireError: the certificate names nobody.
    """
    der = sock.getpeercert(binary_form=True)
    if der is None:
        raise WireError("shows no certificate")
    login, issuer = identity(der)
    if any(each.login == login and each.issuer in (None, issuer) for each in allowed):
        return
    does, rule = _DOES[side]
    raise NotAllowedError(f"{login}, issued by {issuer}, may not {does} here (rule: {rule})", login, issuer, rule)
