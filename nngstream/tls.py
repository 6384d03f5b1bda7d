"""TLS contexts of the data sockets and of the status: both ends show a certificate, or there is no connection.

Mbed TLS (libnng in pynng) knows no Ed25519: give the buffer and its NNG peers P-256 certificates.
"""

from __future__ import annotations

import ssl
import stat

from nngstream.config import Tls
from nngstream.errors import ConfigurationError


def server_context(tls: Tls, *, minimum: ssl.TLSVersion) -> ssl.SSLContext:
    """For listening sockets; a peer without a certificate of our issuers is refused.

    Raises:
        ConfigurationError: a file is missing, unreadable by us, or readable by others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, tls)
    context.minimum_version = minimum
    context.verify_mode = ssl.CERT_REQUIRED
    # A producer that only writes never reads a session ticket, and closing with it unread makes its kernel send a
    # reset that can overtake the last messages.
    context.num_tickets = 0
    return context


def client_context(tls: Tls, *, minimum: ssl.TLSVersion) -> ssl.SSLContext:
    """For sockets that dial; the other end must have the name that was dialled.

    Raises:
        ConfigurationError: as for :func:`server_context`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(context, tls)
    context.minimum_version = minimum
    return context


def _load(context: ssl.SSLContext, tls: Tls) -> None:
    for key, path in (("--tls-certificate", tls.certificate), ("--tls-key", tls.key), ("--tls-ca", tls.ca)):
        if not path.is_file():
            raise ConfigurationError(f"{key}: {path} is no file")
    mode = stat.S_IMODE(tls.key.stat().st_mode)
    if mode & 0o077:
        raise ConfigurationError(
            f"--tls-key: {tls.key} has mode {mode:04o}: others can read it; run `chmod 600 {tls.key}`"
        )
    try:
        context.load_cert_chain(tls.certificate, tls.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(f"--tls-certificate {tls.certificate} with --tls-key {tls.key}: {error}") from error
    try:
        context.load_verify_locations(tls.ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(f"--tls-ca {tls.ca}: {error}") from error
