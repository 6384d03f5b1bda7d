"""The server's side of a `certified` folder, followed while it changes: renewed certificates, issuers, revocations.

Nothing is watched in the background. The files' stamps are compared when a connection or a request arrives, so that a
renewed certificate is used by the next connection, and a removed issuer or a revoked certificate is refused at the next
request, without a restart. What is half written, unreadable or unsafe is not used: the last good state stays in force,
and the log says once which file is wrong.

One event loop owns an instance.
"""

from __future__ import annotations

import datetime
import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from lclstream.security.credentials import Credentials
from lclstream.security.errors import CredentialsError
from lclstream.security.identity import Identity
from lclstream.security.revocation import FILE, RevokedList
from lclstream.security.stamp import Stamp, stamp

log = logging.getLogger(__name__)


@dataclass
class PeerCertificate:
    """The certificate of one connection's peer, parsed once.

    Attributes:
        der: its bytes.
        certificate: the same, parsed.
        identity: whom it names.
    """

    der: bytes
    certificate: x509.Certificate = field(init=False)
    identity: Identity = field(init=False)
    # The last issuers it was compared with, and the result: a signature is verified once, not at every request.
    _judged: tuple[int, bool] = field(init=False, default=(-1, False))

    def __post_init__(self) -> None:
        """Parse it; raises ValueError when it names nobody."""
        self.certificate = x509.load_der_x509_certificate(self.der)
        self.identity = Identity.of_certificate(self.der)

    def signed_by_one_of(self, issuers: list[x509.Certificate], generation: int) -> bool:
        """Whether one of `issuers`, the list number `generation`, signed it directly."""
        if self._judged[0] != generation:
            self._judged = (generation, any(_signed(self.certificate, issuer) for issuer in issuers))
        return self._judged[1]


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


@dataclass(frozen=True)
class _IssuerFile:
    stamp: Stamp | None
    certificates: tuple[x509.Certificate, ...]


class LiveCredentials:
    """A folder whose present content decides who is served.

    Args:
        credentials: the server's folder.

    Raises:
        CredentialsError: the folder cannot be used at the start.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._pair_stamp = self._pair()
        self._context = credentials.server_context()
        self._generation = 0
        self._context_generation = 0
        self._files: dict[Path, _IssuerFile] = {}
        self._refresh_issuers()
        self._context_generation = self._generation
        self.revoked = RevokedList(credentials.folder / FILE)

    def context(self) -> ssl.SSLContext:
        """The TLS context for a connection that arrives now."""
        self._refresh_issuers()
        pair = self._pair()
        if pair == self._pair_stamp and self._generation == self._context_generation:
            return self._context
        try:
            self._credentials.check_key()
            context = self._credentials.server_context_for(self._issuers_pem())
        except (OSError, CredentialsError) as error:  # ssl.SSLError is an OSError
            if pair != self._pair_stamp:
                log.error(
                    "%s: the certificate or key cannot be used (%s); the ones read before stay in use",
                    self._credentials.folder,
                    error,
                )
                self._pair_stamp = pair
            return self._context
        if pair != self._pair_stamp:
            log.info("%s: the renewed certificate is in use", self._credentials.folder)
        self._context, self._pair_stamp, self._context_generation = context, pair, self._generation
        return context

    def refusal(self, peer: PeerCertificate) -> str | None:
        """Why this peer is not served now, or None: certificate, issuer and rule, in words for its owner."""
        self._refresh_issuers()
        who = peer.identity
        certificate = f"certificate {who.serial} of {who.login}, issued by {who.issuer},"
        now = datetime.datetime.now(datetime.UTC)
        entry = self.revoked.find(who, now=now)
        if entry is not None:
            reason = f": {entry.reason}" if entry.reason else ""
            return f"{certificate} is revoked since {entry.since.isoformat()}{reason} (rule: {FILE} of this service)"
        end = peer.certificate.not_valid_after_utc
        if end <= now:
            return f"{certificate} expired at {end.isoformat()} (rule: validity): renew it and connect again"
        issuers = [certificate for file in self._files.values() for certificate in file.certificates]
        if not peer.signed_by_one_of(issuers, self._generation):
            return (
                f"{certificate} was not signed by an issuer in known_clients/ of this service (rule: known issuers): "
                "an intermediate issuer must be listed there itself"
            )
        return None

    def _pair(self) -> tuple[Stamp | None, Stamp | None]:
        return stamp(self._credentials.certificate), stamp(self._credentials.key)

    def _issuers_pem(self) -> str:
        certificates = (certificate for file in self._files.values() for certificate in file.certificates)
        return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)

    def _refresh_issuers(self) -> None:
        folder = self._credentials.folder / "known_clients"
        stamps = {path: stamp(path) for path in sorted(folder.glob("*.crt"))}
        if stamps == {path: file.stamp for path, file in self._files.items()}:
            return
        files: dict[Path, _IssuerFile] = {}
        for path, present in stamps.items():
            known = self._files.get(path)
            if known is not None and known.stamp == present:
                files[path] = known
                continue
            try:
                certificates = tuple(x509.load_pem_x509_certificates(path.read_bytes()))
            except (OSError, ValueError, x509.InvalidVersion) as error:
                # Half written, or damaged: what this very file said before still holds. Other files are not affected.
                certificates = known.certificates if known is not None else ()
                log.error("%s cannot be read as certificates (%s); what it said before stays in force", path, error)
            files[path] = _IssuerFile(present, certificates)
        if self._files:
            log.info("%s: trusting %s now", folder, ", ".join(path.name for path in files) or "nobody")
        self._files = files
        self._generation += 1
