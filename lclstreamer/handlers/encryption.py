"""Encrypted connections to sinks: the wire protocols inside TLS with certificates on both sides.

Python's `ssl` (OpenSSL) does the work on the same plain sockets. TLS 1.2 is allowed because the Mbed TLS inside libnng
may know nothing newer; it knows no Ed25519 either, so a sink that uses libnng needs P-256 certificates on both sides.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
import stat
import time

from lclstreamer.errors import ConfigurationError
from lclstreamer.handlers.wire import Connection, Protocol, WireError
from lclstreamer.models import TlsFiles

#: One TLS write. A write that has to be repeated must have the same bytes again, so it is a slice that is kept.
_WRITE = 256 * 1024
_SMALL = 64 * 1024
_REFUSALS = re.compile(r"ALERT_(BAD_CERT|UNKNOWN_CA|UNSUPPORTED_CERT|CERTIFICATE_|DECRYPT_ERROR|ACCESS_DENIED)")
_ALERT_READ_S = 1.0


class RefusedError(WireError):
    """One side does not accept the other's certificate: trying again does not help."""


def context_for(files: TlsFiles, *, server: bool) -> ssl.SSLContext:
    """The context for sinks that are dialled, or, as a server, for those that dial us.

    Raises:
        ConfigurationError: a file is missing or not what it should be, or the key can be read by others.
    """
    for key, path in (("certificate", files.certificate), ("key", files.key), ("ca", files.ca)):
        if not path.is_file():
            raise ConfigurationError(f"data_handlers.tls.{key}: {path} is no file")
    mode = stat.S_IMODE(files.key.stat().st_mode)
    if mode & 0o077:
        raise ConfigurationError(
            f"data_handlers.tls.key: {files.key} has mode {mode:04o}: others can read it; run `chmod 600 {files.key}`"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if server:
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0  # a resumed session is not verified again
    try:
        context.load_cert_chain(files.certificate, files.key)
    except OSError as error:
        raise ConfigurationError(
            f"data_handlers.tls.certificate: {files.certificate} with data_handlers.tls.key {files.key} is no "
            f"certificate (PEM) with its key: {_words(error)}"
        ) from error
    try:
        context.load_verify_locations(files.ca)
    except OSError as error:
        raise ConfigurationError(
            f"data_handlers.tls.ca: {files.ca} holds no certificate (PEM): {_words(error)}"
        ) from error
    return context


class TlsConnection(Connection):
    """A connection to one pulling peer inside TLS; see :class:`lclstreamer.handlers.wire.Connection`.

    Args:
        sock: a connected socket, which the connection closes.
        protocol: what to speak.
        timeout: how long each step of the handshakes may take, in seconds.
        context: our certificate and whom we trust.
        host: whom we dialled, which the peer's certificate must name; None: the peer dialled us.

    Raises:
        RefusedError: one side does not accept the other's certificate.
        OSError: the peer left, or speaks another protocol.
    """

    _socket: ssl.SSLSocket

    def __init__(
        self, sock: socket.socket, protocol: Protocol, timeout: float, context: ssl.SSLContext, host: str | None
    ) -> None:
        sock.settimeout(timeout)
        try:
            encrypted = context.wrap_socket(
                sock, server_side=host is None, server_hostname=host, do_handshake_on_connect=False
            )
        except BaseException:
            sock.close()
            raise
        try:
            encrypted.do_handshake()
        except ssl.SSLError as error:
            if host is None:
                _let_read(encrypted)
            encrypted.close()
            raise _told(error) from error
        except BaseException:
            encrypted.close()
            raise
        try:
            super().__init__(encrypted, protocol, timeout)
        except ssl.SSLError as error:
            # In TLS 1.3 the refusal of our certificate comes with the first thing we read.
            raise _told(error) from error

    def _write(self, parts: list[memoryview], timeout: float) -> None:
        if sum(part.nbytes for part in parts) <= _SMALL:
            parts = [memoryview(b"".join(parts))]  # each write is a record of its own
        progress = time.monotonic()
        for part in parts:
            for start in range(0, part.nbytes, _WRITE):
                piece = part[start : start + _WRITE]
                while piece.nbytes:
                    try:
                        piece = piece[self._socket.send(piece) :]
                        progress = time.monotonic()
                    except ssl.SSLWantWriteError:
                        self._wait_for_room(progress + timeout - time.monotonic(), timeout)

    def _wait_for_room(self, left: float, timeout: float) -> None:
        if left <= 0:
            raise TimeoutError(f"the peer took nothing for {timeout:.0f} s")
        readable, _, _ = select.select([self._socket], [self._socket], [], min(left, 1.0))
        if readable:
            self._read()

    def _take(self) -> bytes | None:
        try:
            return self._socket.recv(65536)
        except ssl.SSLWantReadError:
            return None


def _let_read(sock: ssl.SSLSocket) -> None:
    """Let the peer read our alert: closing while its bytes are unread would send a reset, which overtakes the alert."""
    deadline = time.monotonic() + _ALERT_READ_S
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            if not socket.socket.recv(sock, 4096):
                return


def _told(error: OSError) -> OSError:
    """The same failure in words that say what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return RefusedError(
            f"the sink's certificate is not accepted: {error.verify_message} (its issuer must be in "
            "data_handlers.tls.ca, and it must carry the name in the URL)"
        )
    text = _words(error)
    if _REFUSALS.search(text):
        return RefusedError(
            f"the sink refuses our certificate, data_handlers.tls.certificate ({text}): its issuer must be one the "
            "sink trusts"
        )
    return WireError(
        f"TLS failed: {text}; does the other side speak TLS, and accept our certificate (libnng: P-256 keys only)?"
    )


def _words(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error or type(error).__name__)
